"""OLMo 3: OLMo 2 with three sliding layers to every full one, which alone have the scaled RoPE."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import SLIDING, DecoderConfig, Rope
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read an OLMo 3 configuration."""
    values = {"rope_theta": 5e5, **values}
    read = ConfigReader(values)
    kinds = read.sliding_pattern(4)
    theta, scaling = read.rope()
    far, near = Rope(theta, scaling), Rope(float(read.get("rope_local_base_freq", theta)))
    return read_decoder(
        {**values, "layer_types": kinds},
        "olmo3",
        qk_norm="full",
        norm_placement="post",
        layer_ropes=tuple(near if kind == SLIDING else far for kind in kinds),
    )


register(
    ModelFamily(
        name="olmo3",
        architectures=("Olmo3ForCausalLM",),
        model_types=("olmo3",),
        configure=configure,
        build=CausalLM,
    )
)
