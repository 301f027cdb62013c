"""Qwen3-MoE: Qwen3's block with experts; some layers may keep a dense MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amx_tvm.models import qwen3
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader
from amx_tvm.models.moe import MixtureLM, read_experts
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.weights import Weight


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Qwen3-MoE configuration: every ``decoder_sparse_step``-th layer has experts."""
    read = ConfigReader(values)
    experts = read_experts(read, "moe_intermediate_size", ("num_experts", "num_local_experts"))
    step, listed = int(read.get("decoder_sparse_step", 1)), read.get("mlp_only_layers", [])
    layers = range(read.require("num_hidden_layers"))
    dense = tuple(i for i in layers if i in listed or (i + 1) % step)
    shares_of_all = not read.get("norm_topk_prob", False)
    config = qwen3.configure(values)
    return replace(
        config, family="qwen3_moe", dense_layers=dense, shares_of_all=shares_of_all, **experts
    )


def weight(name: str, config: DecoderConfig) -> tuple[Weight, ...]:
    """Find a weight: one tensor an expert in checkpoints, stacked in memory and in GGUF files."""
    if name.endswith(".mlp.router.weight"):
        return (Weight(name.replace("router", "gate")),)
    if ".experts." not in name:
        return (Weight(name),)
    stem, expert, part, _ = name.rsplit(".", 3)
    inner = config.expert_size
    stacked = {
        "gate_proj": Weight(f"{stem}.gate_up_proj", index=int(expert), rows=(0, inner)),
        "up_proj": Weight(f"{stem}.gate_up_proj", index=int(expert), rows=(inner, 2 * inner)),
        "down_proj": Weight(f"{stem}.down_proj", index=int(expert)),
    }
    return Weight(name), stacked[part], Weight(f"{stem}.{part}.weight", index=int(expert))


register(
    ModelFamily(
        name="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        model_types=("qwen3_moe",),
        configure=configure,
        build=MixtureLM,
        weight=weight,
    )
)
