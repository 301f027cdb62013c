"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import FULL, SLIDING, DecoderConfig
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register


def window_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with "layer_types" as ``use_sliding_window`` says.

    Layers from ``max_window_layers`` on slide; without the switch none does, whatever the
    other fields hold.
    """
    read = ConfigReader(values)
    if not read.get("use_sliding_window", False):
        return {**values, "layer_types": None}
    if values.get("layer_types"):
        return values
    layers, first = read.require("num_hidden_layers"), int(read.get("max_window_layers", 0))
    return {**values, "layer_types": [SLIDING if i >= first else FULL for i in range(layers)]}


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Qwen2 configuration."""
    return read_decoder(window_of(values), "qwen2", qkv_bias=True, o_bias=False)


register(
    ModelFamily(
        name="qwen2",
        architectures=("Qwen2ForCausalLM",),
        model_types=("qwen2",),
        configure=configure,
        build=CausalLM,
    )
)
