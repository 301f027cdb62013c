"""Small Relax modules that the passes work on, none a language model."""

from __future__ import annotations

from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from relax_passes.activation import FLOAT32
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
