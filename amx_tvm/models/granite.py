"""Granite 3: Llama's block with four factors from the configuration."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import ConfigReader, DecoderConfig, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Granite configuration; logits are divided by ``logits_scaling``."""
    read = ConfigReader(values)
    return read_decoder(
        values,
        "granite",
        attention_factor=float(read.get("attention_multiplier", 1.0)),
        embedding_scale=float(read.get("embedding_multiplier", 1.0)),
        residual_scale=float(read.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(read.get("logits_scaling", 1.0)),
    )


register(
    ModelFamily(
        name="granite",
        architectures=("GraniteForCausalLM",),
        model_types=("granite",),
        configure=configure,
        build=CausalLM,
    )
)
