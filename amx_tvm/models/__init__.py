"""Model families: configurations and Relax modules for what frontends load."""

import amx_tvm.own_packages  # noqa: F401 - it looks for files in the way
from amx_tvm.models import (  # noqa: F401 - they register themselves
    bert,
    cohere,
    deepseek,
    ernie4_5,
    exaone4,
    gemma,
    gemma4,
    glm,
    glm4_moe,
    gpt2,
    gpt_oss,
    granite,
    idefics3,
    llama,
    llava,
    ministral3,
    mistral,
    mixtral,
    modernbert,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
    stablelm,
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
