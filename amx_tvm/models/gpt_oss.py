"""gpt-oss: experts with a clamped gate and biases, attention sinks, every second layer sliding.

A sink is a logit z of a head that takes part in its softmax and adds nothing, so it scales the
head's output by sigmoid(lse - z), lse being the log-sum-exp of the scores. The KV cache hands the
lse out in one more query head of each group (``KVCacheConfig.lse_heads``), whose query is zero.
Expert weights of published checkpoints are MXFP4 with gate and up rows alternating.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tvm import relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.target import Target

from amx_tvm.errors import ModelError
from amx_tvm.models.config import FULL, SLIDING, ConfigReader, DecoderConfig, read_decoder
from amx_tvm.models.decoder import Attention, CausalLM, DecoderModel
from amx_tvm.models.moe import Experts, MixtureLayer, MixtureMLP, read_experts
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.step import Step
from amx_tvm.models.weights import Weight


class SinkAttention(Attention):
    """Attention whose heads have sinks."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config, layer)
        if config.head_dim % 16:
            raise ModelError(
                f"head_dim {config.head_dim} of a model with attention sinks is not supported: "
                "expected a multiple of 16"
            )
        self.sinks = nn.Parameter((config.num_heads,))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Attend: x [tokens, hidden] -> [tokens, hidden]."""
        config, tokens = self.config, x.shape[0]
        heads, kv, d = config.num_heads, config.num_kv_heads, config.head_dim
        group = heads // kv
        q = op.reshape(self.q_proj(x), (tokens, kv, group, d))
        q = op.concat([q, op.zeros((tokens, kv, 1, d), q.dtype)], dim=2)
        qkv = op.concat(
            [
                op.reshape(q, (tokens, heads + kv, d)),
                op.reshape(self.k_proj(x), (tokens, kv, d)),
                op.reshape(self.v_proj(x), (tokens, kv, d)),
            ],
            dim=1,
        )
        scale = config.attention_scale
        if config.slides(self.layer) and Target.current(allow_none=False).kind.name == "llvm":
            scale = -scale  # how the CPU kernels are told of a sliding layer
        call = relax.call_dps_packed(
            "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
            [step.cache._expr, relax.prim_value(self.layer), relax.prim_value(scale), qkv._expr],
            out_ty=relax.TensorType((tokens, heads + kv, d), qkv.dtype),
        )
        attended = Tensor(_expr=relax.BlockBuilder.current().emit(call))
        return self.o_proj(op.reshape(_apply_sinks(attended, self.sinks, group), (tokens, -1)))


def _apply_sinks(attended: Tensor, sinks: Tensor, group: int) -> Tensor:
    """Scale the heads of [tokens, heads + kv heads, d] and drop those that carry the lse."""

    def build(y: te.Tensor, sinks: te.Tensor) -> te.Tensor:
        tokens, d = y.shape[0], y.shape[2]

        def factor(t, h):  # noqa: ANN001, ANN202
            carrier, g = h // group * (group + 1) + group, h % group
            lse = y[t, carrier, g] + y[t, carrier, group + g]  # high and low part, in log2 units
            return 1.0 / (1.0 + tirx.exp(sinks[h] - lse * math.log(2)))

        factors = te.compute((tokens, sinks.shape[0]), factor, "sink_factor")
        return te.compute(
            (tokens, sinks.shape[0], d),
            lambda t, h, i: y[t, h // group * (group + 1) + h % group, i] * factors[t, h],
            "apply_sinks",
        )

    return op.tensor_expr_op(build, "apply_sinks", [attended, sinks])


class ClampedExperts(Experts):
    """Experts with (up + 1) * gate * sigmoid(alpha * gate), both bounded first."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.alpha, self.limit = config.gate_alpha, config.gate_limit

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return what the down projection reads."""
        alpha, limit = self.alpha, self.limit

        def build(gate: te.Tensor, up: te.Tensor) -> te.Tensor:
            def value(t, i):  # noqa: ANN001, ANN202
                bounded = tirx.min(gate[t, i], tirx.const(limit, "float32"))
                other = tirx.max(tirx.min(up[t, i], tirx.const(limit, "float32")), -limit)
                return (other + 1.0) * bounded / (1.0 + tirx.exp(bounded * -alpha))

            return te.compute(gate.shape, value, "clamped_gate")

        return op.tensor_expr_op(build, "clamped_gate", [gate, up])


class GptOssLayer(MixtureLayer):
    """One layer."""

    def make_attention(self, config: DecoderConfig, layer: int) -> nn.Module:
        """Build the attention."""
        return SinkAttention(config, layer)

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
