"""EXAONE 4: norms behind the blocks and on every head; full layers of hybrids have no positions."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import FULL, SLIDING, ConfigReader, DecoderConfig, Rope, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read an EXAONE 4 configuration; without a window, all layers are full and rotate."""
    read = ConfigReader(values)
    layers, differences = read.require("num_hidden_layers"), {}
    if read.get("sliding_window", None):
        kinds = values.get("layer_types") or _kinds(read.get("sliding_window_pattern", 4), layers)
        rope = Rope(*read.rope())
        differences["layer_ropes"] = tuple(rope if kind == SLIDING else None for kind in kinds)
        values = {**values, "layer_types": kinds}
    else:
        values = {**values, "layer_types": None}
    return read_decoder(values, "exaone4", qk_norm="head", norm_placement="post", **differences)


def _kinds(period: int, layers: int) -> list[str]:
    return [FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)]


register(
    ModelFamily(
        name="exaone4",
        architectures=("Exaone4ForCausalLM",),
        model_types=("exaone4",),
        configure=configure,
        build=CausalLM,
    )
)
