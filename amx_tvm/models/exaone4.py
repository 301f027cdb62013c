"""EXAONE 4: norms behind the blocks and on every head; full layers of hybrids have no positions."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import SLIDING, DecoderConfig, Rope
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read an EXAONE 4 configuration; without a window, all layers are full and rotate."""
    read = ConfigReader(values)
    differences: dict[str, Any] = {}
    if read.get("sliding_window", None):
        kinds, rope = read.sliding_pattern(4), Rope(*read.rope())
        differences["layer_ropes"] = tuple(rope if kind == SLIDING else None for kind in kinds)
        values = {**values, "layer_types": kinds}
    else:
        values = {**values, "layer_types": None}
    return read_decoder(values, "exaone4", qk_norm="head", norm_placement="post", **differences)


register(
    ModelFamily(
        name="exaone4",
        architectures=("Exaone4ForCausalLM",),
        model_types=("exaone4",),
        configure=configure,
        build=CausalLM,
    )
)
