"""ERNIE 4.5 (dense): Llama's block in which neighbouring channels rotate; one switch for biases."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.weights import paired


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read an ERNIE 4.5 configuration."""
    biases = bool(ConfigReader(values).get("use_bias", False))
    defaults = {"head_dim": 128, "rope_theta": 5e5, "tie_word_embeddings": True}
    return read_decoder(
        {**defaults, **values}, "ernie4_5", qkv_bias=biases, o_bias=biases, mlp_bias=biases
    )


register(
    ModelFamily(
        name="ernie4_5",
        architectures=("Ernie4_5ForCausalLM",),
        model_types=("ernie4_5",),
        configure=configure,
        build=CausalLM,
        weight=paired,
    )
)
