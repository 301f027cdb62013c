"""OLMo 2: norms behind attention and MLP, RMSNorm over all queries and over all keys."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read an OLMo 2 configuration."""
    return read_decoder(values, "olmo2", qk_norm="full", norm_placement="post")


register(
    ModelFamily(
        name="olmo2",
        architectures=("Olmo2ForCausalLM",),
        model_types=("olmo2",),
        configure=configure,
        build=CausalLM,
    )
)
