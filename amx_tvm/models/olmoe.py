"""OLMoE: experts in every layer, RMSNorm over all queries and over all keys."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.moe import MixtureLM, read_experts
from amx_tvm.models.qwen3_moe import weight
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read an OLMoE configuration; ``intermediate_size`` is an expert's."""
    read = ConfigReader(values)
    read.only("clip_qkv", {None: None}, None)
    shares_of_all = not read.get("norm_topk_prob", False)
    experts = read_experts(read, "intermediate_size", ("num_experts", "num_local_experts"))
    return read_decoder(values, "olmoe", qk_norm="full", shares_of_all=shares_of_all, **experts)


register(
    ModelFamily(
        name="olmoe",
        architectures=("OlmoeForCausalLM",),
        model_types=("olmoe",),
        configure=configure,
        build=MixtureLM,
        weight=weight,
    )
)
