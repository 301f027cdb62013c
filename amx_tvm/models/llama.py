"""Llama-type models: Llama 2 and 3, SmolLM2, and what shares their block unchanged."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Llama configuration."""
    return read_decoder(values, "llama")


register(
    ModelFamily(
        name="llama",
        architectures=("LlamaForCausalLM",),
        model_types=("llama",),
        configure=configure,
        build=CausalLM,
    )
)
