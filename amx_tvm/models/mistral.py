"""Mistral: Llama's block; in the first version every layer slides over the last 4096 tokens."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import SLIDING, DecoderConfig
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Mistral configuration: a window, where there is one, holds for all layers."""
    read = ConfigReader(values)
    layers, window = read.require("num_hidden_layers"), int(read.get("sliding_window", 0))
    if values.get("layer_types") or not window:
        return read_decoder(values, "mistral")
    return read_decoder({**values, "layer_types": [SLIDING] * layers}, "mistral")


register(
    ModelFamily(
        name="mistral",
        architectures=("MistralForCausalLM",),
        model_types=("mistral",),
        configure=configure,
        build=CausalLM,
    )
)
