"""Mixtral: Mistral's block with a mixture of experts for the MLP, shares over the chosen ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amx_tvm.models import mistral
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader
from amx_tvm.models.moe import MixtureLM, read_experts
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.weights import Weight

STORED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Mixtral configuration."""
    experts = read_experts(ConfigReader(values), "intermediate_size", ("num_local_experts",))
    return replace(mistral.configure(values), family="mixtral", **experts)


def weight(name: str, config: DecoderConfig) -> tuple[Weight, ...]:
    """Find a weight: one tensor an expert in checkpoints, stacked in memory and in GGUF files."""
    block = name.replace(".mlp.", ".block_sparse_moe.")
    if name.endswith(".mlp.router.weight"):
        return tuple(Weight(n.replace("router", "gate")) for n in (block, name))
    if ".experts." not in name:
        return (Weight(name),)
    stem, expert, part, _ = block.rsplit(".", 3)
    inner, memory = config.expert_size, name.rsplit(".", 3)[0]
    stacked = {
        "gate_proj": Weight(f"{memory}.gate_up_proj", index=int(expert), rows=(0, inner)),
        "up_proj": Weight(f"{memory}.gate_up_proj", index=int(expert), rows=(inner, 2 * inner)),
        "down_proj": Weight(f"{memory}.down_proj", index=int(expert)),
    }
    return (
        Weight(f"{stem}.{expert}.{STORED[part]}.weight"),
        stacked[part],
        Weight(f"{memory}.{part}.weight", index=int(expert)),
        Weight(name),
    )


register(
    ModelFamily(
        name="mixtral",
        architectures=("MixtralForCausalLM",),
        model_types=("mixtral",),
        configure=configure,
        build=MixtureLM,
        weight=weight,
    )
)
