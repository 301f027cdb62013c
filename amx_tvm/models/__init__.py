"""Model families: configurations and Relax modules for what frontends load."""

import amx_tvm.own_packages  # noqa: F401 - it looks for files in the way
from amx_tvm.models import (  # noqa: F401 - they register themselves
    gemma,
    gpt2,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.registry import ModelFamily, families, find, register
from amx_tvm.models.weights import Weight

__all__ = [
    "DecoderConfig",
    "ModelFamily",
    "Weight",
    "families",
    "find",
    "register",
]
