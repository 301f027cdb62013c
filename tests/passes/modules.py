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


@I.ir_module
class Planned:
    """Layers of one kernel with a weight, and views between, for any number of rows."""

    @T.prim_func(private=True, s_tir=True)
    def scale(var_x: T.handle, w: T.Buffer((64,), "float32"), var_y: T.handle):
        n = T.int64()
        x = T.match_buffer(var_x, (n, 64), "float32")
        y = T.match_buffer(var_y, (n, 64), "float32")
        for i, j in T.grid(n, 64):
            with T.sblock("scale"):
                v_i, v_j = T.axis.remap("SS", [i, j])
                y[v_i, v_j] = x[v_i, v_j] * w[v_j]

    @T.prim_func(private=True, s_tir=True)
    def twice(var_x: T.handle, var_y: T.handle):
        m = T.int64()
        x = T.match_buffer(var_x, (m, 32), "float32")
        y = T.match_buffer(var_y, (m, 32), "float32")
        for i, j in T.grid(m, 32):
            with T.sblock("twice"):
                v_i, v_j = T.axis.remap("SS", [i, j])
                y[v_i, v_j] = x[v_i, v_j] * T.float32(2)

    @R.function
    def main(x: R.Tensor(("n", 64), "float32"), w: R.Tensor((64,), "float32")):
        R.func_attr({"num_input": 1})
        n = T.int64()
        cls = Planned
        with R.dataflow():
            a = R.call_tir(cls.scale, (x, w), out_ty=R.Tensor((n, 64), "float32"))
            b: R.Tensor((n * 2, 32), "float32") = R.reshape(a, (n * 2, 32))
            c = R.call_tir(cls.twice, (b,), out_ty=R.Tensor((n * 2, 32), "float32"))
            d: R.Tensor((n, 64), "float32") = R.reshape(c, (n, 64))
            e = R.call_tir(cls.scale, (d, w), out_ty=R.Tensor((n, 64), "float32"))
            f: R.Tensor((n * 2, 32), "float32") = R.reshape(e, (n * 2, 32))
            g = R.call_tir(cls.twice, (f,), out_ty=R.Tensor((n * 2, 32), "float32"))
            h: R.Tensor((n, 64), "float32") = R.reshape(g, (n, 64))
            i = R.call_tir(cls.scale, (h, w), out_ty=R.Tensor((n, 64), "float32"))
            k = R.call_tir(cls.scale, (i, w), out_ty=R.Tensor((n, 64), "float32"))
            out = R.call_tir(cls.scale, (k, w), out_ty=R.Tensor((n, 64), "float32"))
            R.output(out)
        return out


@I.ir_module
class Images:
    """A function of float32 in float16's way: patches of images, a sum beside a product."""

    @R.function
    def main(
        x: R.Tensor(("b", 3, 8, 8), "float32"),
        w: R.Tensor((32, 3, 4, 4), "float32"),
        scale: R.Tensor((4,), "float32"),
    ):
        R.func_attr({"num_input": 1, "amx.single": 1})
        b = T.int64()
        with R.dataflow():
            patches: R.Tensor((b, 32, 2, 2), "float32") = R.nn.conv2d(x, w, strides=[4, 4])
            lines: R.Tensor((b, 32, 4), "float32") = R.reshape(patches, (b, 32, 4))
            likely: R.Tensor((b, 32, 4), "float32") = R.nn.softmax(lines)
            scaled: R.Tensor((b, 32, 4), "float32") = R.multiply(lines, scale)
            out: R.Tensor((b, 32, 4), "float32") = R.add(scaled, likely)
            R.output(out)
        return out


@I.ir_module
class Attending:
    """Attention of two heads between permutations, as torch's frontend writes it."""

    @R.function
    def main(qkv: R.Tensor(("b", 8, 96), "float16")):
        R.func_attr({"num_input": 1})
        b = T.int64()
        with R.dataflow():
            parts = R.split(qkv, 3, axis=-1)
            q: R.Tensor((b, 8, 32), "float16") = parts[0]
            k: R.Tensor((b, 8, 32), "float16") = parts[1]
            v: R.Tensor((b, 8, 32), "float16") = parts[2]
            q1: R.Tensor((b, 8, 2, 16), "float16") = R.reshape(q, (b, 8, 2, 16))
            k1: R.Tensor((b, 8, 2, 16), "float16") = R.reshape(k, (b, 8, 2, 16))
            v1: R.Tensor((b, 8, 2, 16), "float16") = R.reshape(v, (b, 8, 2, 16))
            q2: R.Tensor((b, 2, 8, 16), "float16") = R.permute_dims(q1, [0, 2, 1, 3])
            q3: R.Tensor((b, 8, 2, 16), "float16") = R.permute_dims(q2, [0, 2, 1, 3])
            y: R.Tensor((b, 8, 2, 16), "float16") = R.nn.attention(q3, k1, v1)
            y1: R.Tensor((b, 2, 8, 16), "float16") = R.permute_dims(y, [0, 2, 1, 3])
            y2: R.Tensor((b, 8, 2, 16), "float16") = R.permute_dims(y1, [0, 2, 1, 3])
            out: R.Tensor((b, 8, 32), "float16") = R.reshape(y2, (b, 8, 32))
            R.output(out)
        return out


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


def embedder(dtype="float32"):
    """Return the module of a small model of embeddings, of one layer that slides."""
    config = replace(shape(1, window=8), layer_kinds=(SLIDING,), causal=False)
    network = EmbeddingModel(config, DecoderModel(config), ())
    network.to(dtype)
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
