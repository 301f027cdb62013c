"""Ministral 3 (text): Mistral's block with YaRN, and queries that grow with their position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amx_tvm.models import mistral
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register

GROWTH = "llama_4_scaling_beta"


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Ministral 3 configuration; the growth stands beside the scaling of its RoPE."""
    scaling = {**(values.get("rope_scaling") or {})}
    scaling.pop("max_position_embeddings", None)
    beta = float(scaling.pop(GROWTH, None) or 0.0)
    config = mistral.configure({**values, "rope_scaling": scaling})
    if not beta:
        return replace(config, family="ministral3")
    trained = ConfigReader(scaling).require("original_max_position_embeddings")
    return replace(config, family="ministral3", query_growth=(beta, trained))


register(
    ModelFamily(
        name="ministral3",
        architectures=("Ministral3ForCausalLM",),
        model_types=("ministral3",),
        configure=configure,
        build=CausalLM,
    )
)
