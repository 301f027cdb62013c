"""Small Relax modules that the passes work on."""

from __future__ import annotations

from dataclasses import replace

from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from amx_tvm.models.config import FULL, SLIDING, DecoderConfig
from amx_tvm.models.decoder import CausalLM, DecoderModel
from amx_tvm.models.embedding import EmbeddingModel
from relax_passes.activation import FLOAT32
from relax_passes.ops import (
    clamped_gate,
    expert_combine,
    expert_group,
    expert_matmul,
    expert_route,
)
from relax_passes.policy import LinearPolicy


class Policy:
    """One format and scheme for all linears."""

    def __init__(self, fmt="amxfp4", activation=FLOAT32):
        self.choice = LinearPolicy(fmt, activation)

    def linear(self, name):
        return self.choice

    def table(self, name):
        return "none"


class Weights:
    """A stand-in for a model source: named arrays."""

    def __init__(self, arrays):
        self.arrays = arrays

    def load(self, name):
        return self.arrays[name]

    def load_raw(self, name):
        return None


@I.ir_module
class Gated:
    """x + down(silu(gate x) * up x), gate and up in torch's orientation, down in ONNX's."""

    @R.function
    def main(
        x: R.Tensor(("m", 64), "float32"),
        gate: R.Tensor((96, 64), "float32"),
        up: R.Tensor((96, 64), "float32"),
        down: R.Tensor((96, 64), "float32"),
        bias: R.Tensor((64,), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            g = R.matmul(x, R.permute_dims(gate))
            u = R.matmul(x, R.permute_dims(up))
            h = R.multiply(R.nn.silu(g), u)
            d = R.matmul(h, down)
            b = R.add(d, bias)
            y = R.add(x, b)
            R.output(y)
        return y


@I.ir_module
class Ragged:
    """Two linears of one input, whose rows are no multiples of 16."""

    @R.function
    def main(
        x: R.Tensor(("m", 64), "float32"),
        a: R.Tensor((24, 64), "float32"),
        b: R.Tensor((40, 64), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.concat((R.matmul(x, R.permute_dims(a)), R.matmul(x, R.permute_dims(b))), axis=-1)
            R.output(y)
        return y


@I.ir_module
class Loops:
    """TensorIR without a schedule: elements, and a sum of rows."""

    @T.prim_func(private=True, s_tir=True)
    def exp(x: T.Buffer((64, 1024), "float32"), y: T.Buffer((64, 1024), "float32")):
        for i, j in T.grid(64, 1024):
            with T.sblock("exp"):
                v_i, v_j = T.axis.remap("SS", [i, j])
                y[v_i, v_j] = T.exp(x[v_i, v_j])

    @T.prim_func(private=True, s_tir=True)
    def total(x: T.Buffer((64, 1024), "float32"), y: T.Buffer((64,), "float32")):
        for i, k in T.grid(64, 1024):
            with T.sblock("total"):
                v_i, v_k = T.axis.remap("SR", [i, k])
                with T.init():
                    y[v_i] = T.float32(0)
                y[v_i] = y[v_i] + x[v_i, v_k]


def shape(layers=2, window=0, vocab=64, **more):
    """Return the shape of a small model."""
    made = DecoderConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=64,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        context_length=128,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rotary_dim=4,
        layer_kinds=(FULL, SLIDING)[:layers] if window else (),
        sliding_window=window,
    )
    return replace(made, **more)


def embedder():
    """Return the module of a small model of embeddings, of one layer that slides."""
    config = replace(shape(1, window=8), layer_kinds=(SLIDING,), causal=False)
    network = EmbeddingModel(config, DecoderModel(config), ())
    module, _ = network.export_tvm(network.export_spec())
    return module


def decoder(layers=2, window=0, vocab=64, dtype="float16", **more):
    """Return the module of a small decoder, as the compiler's passes get it."""
    network = CausalLM(shape(layers, window, vocab, **more))
    network.to(dtype)
    module, _ = network.export_tvm(network.export_spec())
    return module


def routed(experts=4, chosen=2):
    """Return a function that routes rows to experts and sorts them."""
    builder = relax.BlockBuilder()
    rows = tirx.Var("rows", "int64")
    scores = relax.Var("scores", relax.TensorType((rows, experts), "float32"))
    with builder.function("route", [scores], attrs={"num_input": 1}):
        with builder.dataflow():
            made = builder.emit(expert_route(scores, chosen, over_all=False))
            ids, shares = (builder.emit(relax.TupleGetItem(made, i)) for i in range(2))
            grouped = builder.emit(expert_group(ids, experts))
            out = builder.emit_output(relax.Tuple([shares, grouped]))
        builder.emit_func_output(out)
    return builder.get()


def mixture(experts=4, chosen=2, hidden=64, inner=32):
    """Return a step of a mixture's layer on a GPU: router, products with a gate, sum, residual."""
    builder = relax.BlockBuilder()
    rows, emit = tirx.Var("rows", "int64"), builder.emit

    def var(name, *shape, dtype="float16"):
        return relax.Var(name, relax.TensorType(shape, dtype))

    x, router = var("x", rows, hidden), var("mlp.router.weight", experts, hidden, dtype="float32")
    gate_up = var("mlp.experts.gate_up_proj.weight", experts * 2 * inner, hidden)
    bias = var("mlp.experts.gate_up_proj.bias", experts * 2 * inner)
    down = var("mlp.experts.down_proj.weight", experts * hidden, inner)
    params = [x, router, gate_up, bias, down]
    with builder.function("forward_each", params, attrs={"num_input": 1, "amx.each": 1}):
        with builder.dataflow():
            wide = emit(relax.op.astype(x, "float32"))
            scores = emit(relax.op.matmul(wide, emit(relax.op.permute_dims(router))))
            made = emit(expert_route(scores, chosen, over_all=True))
            ids, shares = (emit(relax.TupleGetItem(made, i)) for i in range(2))
            grouped = emit(expert_group(ids, experts))
            source, place, bounds = (emit(relax.TupleGetItem(grouped, i)) for i in range(3))
            listed = emit(relax.op.reshape(source, [rows * chosen]))
            taken = emit(relax.op.take(x, listed, axis=0))
            gates = emit(expert_matmul(taken, gate_up, bounds, bias, experts))
            gated = emit(clamped_gate(gates, 1.702, 7.0))
            products = emit(expert_matmul(gated, down, bounds, None, experts))
            combined = emit(expert_combine(products, shares, place))
            out = builder.emit_output(relax.op.add(combined, x))
        builder.emit_func_output(out)
    return builder.get()
