"""GLM-4.5: half of every head rotates, DeepSeek's routing, norms of q and k in the large one."""

from __future__ import annotations

from typing import Any

from amx_tvm.models import qwen3_moe
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.routing import RoutedLM, read_routing
from amx_tvm.models.weights import Weight


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a GLM-4.5 configuration."""
    read = ConfigReader(values)
    return read_decoder(
        {"partial_rotary_factor": 0.5, **values},
        "glm4_moe",
        o_bias=False,
        qk_norm="head" if read.get("use_qk_norm", False) else "",
        **read_routing({"first_k_dense_replace": 1, **values}, "sigmoid"),
    )


def weight(name: str, config: DecoderConfig) -> tuple[Weight, ...]:
    """Find a weight."""
    if name.endswith(".mlp.choice_bias"):
        return (Weight(name.replace("choice_bias", "gate.e_score_correction_bias")),)
    return qwen3_moe.weight(name, config)


register(
    ModelFamily(
        name="glm4_moe",
        architectures=("Glm4MoeForCausalLM",),
        model_types=("glm4_moe",),
        configure=configure,
        build=RoutedLM,
        weight=weight,
    )
)
