"""Qwen3: Llama's block with RMSNorm on every head's query and key, and its own head_dim."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import read_decoder
from amx_tvm.models.decoder import CausalLM, DecoderModel
from amx_tvm.models.qwen2 import window_of
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Qwen3 configuration."""
    values = {"head_dim": 128, **window_of(values)}
    return read_decoder(values, "qwen3", qk_norm="head")


register(
    ModelFamily(
        name="qwen3",
        architectures=("Qwen3ForCausalLM",),
        model_types=("qwen3",),
        configure=configure,
        build=CausalLM,
    )
)
register(
    ModelFamily(
        name="qwen3-embedding",
        architectures=("Qwen3ForCausalLM", "Qwen3Model"),
        model_types=("qwen3",),
        configure=configure,
        build=DecoderModel,
        kind="embedding",
    )
)
