"""gpt-oss: experts with a clamped gate and biases, attention sinks, every second layer sliding.

Expert weights of published checkpoints are MXFP4 with gate and up rows alternating.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from amx_tvm.models.config import FULL, SLIDING, DecoderConfig
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM, DecoderModel
from amx_tvm.models.moe import Experts, MixtureLayer, MixtureMLP, read_experts
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.weights import Weight
from relax_passes.ops import clamped_gate


class ClampedExperts(Experts):
    """Experts with (up + 1) * gate * sigmoid(alpha * gate), both bounded first."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.alpha, self.limit = config.gate_alpha, config.gate_limit

    def gated(self, x: Tensor) -> Tensor:
        """Return what the down projection reads, of gates and ups side by side."""
        call = clamped_gate(x._expr, self.alpha, self.limit)
        return Tensor(_expr=relax.BlockBuilder.current().emit(call))


class GptOssLayer(MixtureLayer):
    """One layer."""

    def make_mlp(self, config: DecoderConfig, layer: int) -> nn.Module:
        """Build the MLP."""
        return MixtureMLP(config, ClampedExperts(config))


class GptOssModel(DecoderModel):
    """The decoder."""

    def make_layer(self, config: DecoderConfig, index: int) -> nn.Module:
        """Build one layer."""
        return GptOssLayer(config, index)


class GptOss(CausalLM):
    """gpt-oss."""

    def make_model(self, config: DecoderConfig) -> nn.Module:
        """Build the decoder."""
        return GptOssModel(config)


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a gpt-oss configuration; even layers slide by default."""
    read = ConfigReader(values)
    layers = read.require("num_hidden_layers")
    kinds = [SLIDING if i % 2 == 0 else FULL for i in range(layers)]
    values = {
        "rope_theta": 150000.0,
        **values,
        "layer_types": values.get("layer_types") or kinds,
        "attention_bias": read.get("attention_bias", True),
        "mlp_bias": True,
    }
    return read_decoder(
        values,
        "gpt_oss",
        attention_sinks=True,
        router_bias=True,
        gate_alpha=float(read.get("swiglu_alpha", 1.702)),
        gate_limit=float(read.get("swiglu_limit", 7.0)),
        **read_experts(read, "intermediate_size", ("num_local_experts", "num_experts")),
    )


def weight(name: str, config: DecoderConfig) -> tuple[Weight, ...]:
    """Find a weight: experts are stacked, as MXFP4 rows, as transposed floats, or part by part."""
    if ".experts." not in name:
        return (Weight(name),)
    stem, expert, part, kind = name.rsplit(".", 3)
    stored = f"{stem}.down_proj" if part == "down_proj" else f"{stem}.gate_up_proj"
    inner = 2 * config.expert_size
    rows = {"gate_proj": (0, inner), "up_proj": (1, inner), "down_proj": None}[part]
    place = Weight(f"{stored}_bias", int(expert), rows=rows, step=1 if rows is None else 2)
    apart = Weight(f"{stem}.{part}.{kind}", int(expert))
    if kind == "bias":
        return place, apart
    blocks = replace(place, name=f"{stored}_blocks")
    return blocks, replace(place, name=stored, transpose=True), apart


register(
    ModelFamily(
        name="gpt_oss",
        architectures=("GptOssForCausalLM",),
        model_types=("gpt_oss",),
        configure=configure,
        build=GptOss,
        weight=weight,
    )
)
