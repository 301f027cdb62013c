"""The project's own Relax operators: what a quantized model is made of until legalization.

``amx.linear``              y[.., N] = x[.., K] @ W[N, K]^T, with an optional epilogue
``amx.quantize_activation`` x -> (codes, scales, sums), optionally behind RMSNorm or silu(a) * b
``amx.embedding``           rows of a packed table as float32
``amx.expert_matmul``       a mixture's products before annotation: rows sorted by expert

Each is a first-class operator with a purity and a type rule, so every stock Relax pass (dead code,
common subexpressions, memory planning) understands a module that holds them. Their attributes are
one frozen dataclass each; ``of(call)`` reads it back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import tvm
from tvm import relax
from tvm.ir import Op, make_node

# TVM 0.27 has no public way to register an operator from Python; this is the only use of it.
from tvm.ir import _ffi_api as _register

from relax_passes.activation import FLOAT32, Activation, Buffers


@dataclass(frozen=True)
class LinearAttrs:
    """Attributes of ``amx.linear``; ``num_x`` and ``num_w`` split its flat argument list."""

    name: str
    n: int
    k: int
    format: str = "none"
    layout: str = ""
    activation: Activation = FLOAT32
    num_x: int = 1
    num_w: int = 1
    bias: bool = False
    residual: bool = False
    silu_mul: bool = False
    out_dtype: str = "float32"
    bucket: str = ""
    experts: int = 0

    @property
    def out_features(self) -> int:
        """Columns of the result: N, or N / 2 when silu(gate) * up is folded in."""
        return self.n // 2 if self.silu_mul else self.n


@dataclass(frozen=True)
class QuantizeAttrs:
    """Attributes of ``amx.quantize_activation``; ``prologue`` is what runs on the input before."""

    scheme: Activation
    k: int
    sums: bool = False
    prologue: str = "none"  # "none", "rms_norm" (x, weight) or "silu_mul" (gate, up)
    eps: float = 0.0


@dataclass(frozen=True)
class EmbeddingAttrs:
    """Attributes of ``amx.embedding``: a packed table [rows, k]."""

    rows: int
    k: int
    format: str
    layout: str
    out_dtype: str = "float32"


def _node(attrs: Any) -> tvm.ir.Attrs:
    def plain(value: Any) -> Any:
        if isinstance(value, Activation):
            return str(value)
        return int(value) if isinstance(value, bool) else value

    values = {f.name: plain(getattr(attrs, f.name)) for f in fields(attrs)}
    return make_node("ir.DictAttrs", **values)


def _read(kind: Any, call: relax.Call) -> Any:
    casts: dict[Any, Callable] = {
        "bool": bool,
        "int": int,
        "float": float,
        "str": str,
        "Activation": lambda text: Activation.parse(str(text)),
    }
    return kind(**{f.name: casts[f.type](call.attrs[f.name]) for f in fields(kind)})


@cache
def _operator(name: str) -> Op:
    """Register an operator once a process and return it."""
    if name not in Op.list_op_names():
        _register.RegisterOp(name, "amx_tvm operator")
        op = Op.get(name)
        op.set_num_inputs(-1)
        op.set_attrs_type_key("ir.DictAttrs")
        op.set_attr("FPurity", True)
        op.set_attr("FInferType", _INFER[name])
    return Op.get(name)


def is_op(expr: relax.Expr, name: str) -> bool:
    """Whether an expression is a call of the named operator (``amx.*`` or Relax's own)."""
    return isinstance(expr, relax.Call) and isinstance(expr.op, Op) and expr.op.name == name


@dataclass(frozen=True)
class Linear:
    """An ``amx.linear`` call taken apart."""

    attrs: LinearAttrs
    x: tuple[relax.Expr, ...]
    weights: tuple[relax.Expr, ...]
    bias: relax.Expr | None = None
    residual: relax.Expr | None = None
    bounds: relax.Expr | None = None  # of the experts' rows; see LinearSpec.experts

    @staticmethod
    def of(call: relax.Call) -> Linear:
        """Take a call apart by the counts in its attributes."""
        attrs = _read(LinearAttrs, call)
        args = list(call.args)
        x, args = args[: attrs.num_x], args[attrs.num_x :]
        w, args = args[: attrs.num_w], args[attrs.num_w :]
        bias = args.pop(0) if attrs.bias else None
        residual = args.pop(0) if attrs.residual else None
        bounds = args.pop(0) if attrs.experts else None
        return Linear(attrs, tuple(x), tuple(w), bias, residual, bounds)

    def call(self) -> relax.Call:
        """Build the call; counts and flags in the attributes follow from the arguments."""
        attrs = replace(
            self.attrs,
            num_x=len(self.x),
            num_w=len(self.weights),
            bias=self.bias is not None,
            residual=self.residual is not None,
        )
        extra = [a for a in (self.bias, self.residual, self.bounds) if a is not None]
        return relax.Call(_operator("amx.linear"), [*self.x, *self.weights, *extra], _node(attrs))


def expert_matmul(
    x: relax.Expr, weight: relax.Expr, bounds: relax.Expr, bias: relax.Expr | None, experts: int
) -> relax.Call:
    """Build a call of ``amx.expert_matmul``.

    Parameters
    ----------
    x : relax.Expr
        [rows, K], sorted by expert.
    weight : relax.Expr
        [experts * N, K], one expert's rows after another's.
    bounds : relax.Expr
        int32 [experts + 1]: the first row of x of each expert, and the end.
    bias : relax.Expr or None
        [experts * N].
    experts : int
        How many.
    """
    args = [x, weight, bounds] + ([bias] if bias is not None else [])
    attrs = make_node("ir.DictAttrs", experts=experts)
    return relax.Call(_operator("amx.expert_matmul"), args, attrs)


def quantize_activation(args: Sequence[relax.Expr], attrs: QuantizeAttrs) -> relax.Call:
    """Build a call of ``amx.quantize_activation``."""
    return relax.Call(_operator("amx.quantize_activation"), list(args), _node(attrs))


def quantize_attrs(call: relax.Call) -> QuantizeAttrs:
    """Read the attributes of an ``amx.quantize_activation`` call."""
    return _read(QuantizeAttrs, call)


def embedding(ids: relax.Expr, weights: Sequence[relax.Expr], attrs: EmbeddingAttrs) -> relax.Call:
    """Build a call of ``amx.embedding``: ids int32 [..] and the table's packed parts."""
    return relax.Call(_operator("amx.embedding"), [ids, *weights], _node(attrs))


def embedding_attrs(call: relax.Call) -> EmbeddingAttrs:
    """Read the attributes of an ``amx.embedding`` call."""
    return _read(EmbeddingAttrs, call)


def activation_parts(attrs: QuantizeAttrs) -> Buffers:
    """List the tensors of a quantized activation as (name, shape after the leading axes, dtype).

    The kernels' own description of their arguments is the only source of this.
    """
    return attrs.scheme.buffers(attrs.k, attrs.sums)


def _lead(expr: relax.Expr) -> list:
    return list(expr.ty.shape.values)[:-1]


def _infer_linear(call: relax.Call, _ctx: object) -> relax.Type:
    attrs = _read(LinearAttrs, call)
    return relax.TensorType([*_lead(call.args[0]), attrs.out_features], attrs.out_dtype)


def _infer_quantize(call: relax.Call, _ctx: object) -> relax.Type:
    attrs = quantize_attrs(call)
    lead = _lead(call.args[0])
    return relax.TupleType(
        [relax.TensorType([*lead, *shape], dtype) for _, shape, dtype in activation_parts(attrs)]
    )


def _infer_embedding(call: relax.Call, _ctx: object) -> relax.Type:
    attrs = embedding_attrs(call)
    return relax.TensorType([*call.args[0].ty.shape.values, attrs.k], attrs.out_dtype)


def _infer_expert_matmul(call: relax.Call, _ctx: object) -> relax.Type:
    x, weight = call.args[:2]
    n = int(weight.ty.shape.values[0]) // int(call.attrs["experts"])
    return relax.TensorType([*_lead(x), n], x.ty.dtype)


_INFER = {
    "amx.linear": _infer_linear,
    "amx.expert_matmul": _infer_expert_matmul,
    "amx.quantize_activation": _infer_quantize,
    "amx.embedding": _infer_embedding,
}
