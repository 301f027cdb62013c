"""The project's own Relax operators: what a quantized model is made of until legalization.

``amx.linear``              y[.., N] = x[.., K] @ W[N, K]^T, with an optional epilogue
``amx.quantize_activation`` x -> (codes, scales, sums), optionally behind RMSNorm or silu(a) * b
``amx.embedding``           rows of a packed table as float32
``amx.expert_matmul``       a mixture's products before annotation: rows sorted by expert
``amx.expert_route``        which experts a row takes, and their shares
``amx.expert_group``        rows sorted by expert
``amx.expert_combine``      each row's products, added by their shares
``amx.clamped_gate``        (up + 1) * gate * sigmoid(alpha * gate), both bounded first
``amx.kv_cache``            the paged cache of keys and values
``amx.attention``           appends a layer's keys and values to it and attends
``amx.packed_attention``    attention inside each of several texts, one behind the other, no cache
``amx.mean_rows``           the mean of each of several spans of rows

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
from relax_passes.attention_spec import AttentionSpec


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
    experts: int = 0
    gathered: int = 0
    listed: bool = False
    gate_alpha: float = 0.0
    gate_limit: float = 0.0

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
    prologue: str = "none"  # or "rms_norm" (x, weight), "silu_mul", "gelu_mul" (gate, up), "gelu"
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
    source: relax.Expr | None = None  # rows of x of a mixture's slots; see LinearSpec.gathered
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
        source = args.pop(0) if attrs.gathered and not attrs.listed else None
        bounds = args.pop(0) if attrs.experts else None
        return Linear(attrs, tuple(x), tuple(w), bias, residual, source, bounds)

    def call(self) -> relax.Call:
        """Build the call; counts and flags in the attributes follow from the arguments."""
        attrs = replace(
            self.attrs,
            num_x=len(self.x),
            num_w=len(self.weights),
            bias=self.bias is not None,
            residual=self.residual is not None,
        )
        given = (self.bias, self.residual, self.source, self.bounds)
        extra = [a for a in given if a is not None]
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


def expert_route(scores: relax.Expr, chosen: int, over_all: bool) -> relax.Call:
    """Build a call of ``amx.expert_route``: scores [rows, experts] -> ids, shares [rows, chosen].

    Shares are the softmax over all experts' scores, or over those of the chosen.
    """
    attrs = make_node("ir.DictAttrs", chosen=chosen, over_all=int(over_all))
    return relax.Call(_operator("amx.expert_route"), [scores], attrs)


def expert_group(ids: relax.Expr, experts: int) -> relax.Call:
    """Build a call of ``amx.expert_group``: int32 [rows, chosen] -> source, place, bounds.

    ``source`` lists the rows of x, sorted by expert; ``place`` is where each of a row's products
    is; ``bounds`` int32 [experts + 1] are the first of each expert's and the end.
    """
    attrs = make_node("ir.DictAttrs", experts=experts)
    return relax.Call(_operator("amx.expert_group"), [ids], attrs)


def expert_combine(y: relax.Expr, shares: relax.Expr, place: relax.Expr) -> relax.Call:
    """Build a call of ``amx.expert_combine``: y [slots, N] -> [rows, N].

    ``shares`` and ``place`` [rows, chosen] are those of ``amx.expert_route`` and
    ``amx.expert_group``.
    """
    attrs = make_node("ir.DictAttrs")
    return relax.Call(_operator("amx.expert_combine"), [y, shares, place], attrs)


def clamped_gate(x: relax.Expr, alpha: float, limit: float) -> relax.Call:
    """Build a call of ``amx.clamped_gate``: x [.., 2 n], gates in front of ups -> [.., n].

    Gates are at most ``limit``, ups within plus and minus it.
    """
    attrs = make_node("ir.DictAttrs", alpha=alpha, limit=limit)
    return relax.Call(_operator("amx.clamped_gate"), [x], attrs)


def kv_cache(sizes: relax.Expr) -> relax.Call:
    """Build a call of ``amx.kv_cache``.

    Parameters
    ----------
    sizes : relax.Expr
        A shape: most sequences, tokens of all sequences, and tokens of one pass.
    """
    return relax.Call(_operator("amx.kv_cache"), [sizes], make_node("ir.DictAttrs"))


def attention(
    qkv: relax.Expr,
    cache: relax.Expr,
    spec: AttentionSpec,
    sinks: relax.Expr | None = None,
    long: relax.Expr | None = None,
) -> relax.Call:
    """Build a call of ``amx.attention``: pure, although it appends to the cache.

    What orders the layers is their data: each one's qkv needs the one before.

    Parameters
    ----------
    qkv : relax.Expr
        [rows, heads + 2 kv_heads, head_dim], not rotated.
    cache : relax.Expr
        What ``amx.kv_cache`` made.
    spec : AttentionSpec
        What it computes.
    sinks : relax.Expr or None
        [heads], where the spec has sinks.
    long : relax.Expr or None
        int32 [rows], 1 where the spec's rotation for long sequences counts, if it has one.

    Returns
    -------
    relax.Call
        [rows, heads, head_dim], of qkv's type.
    """
    args = [qkv, cache] + ([sinks] if spec.sinks else [])
    args += [long] if spec.long_rotation.pairs else []
    attrs = make_node("ir.DictAttrs", **spec.attributes())
    return relax.Call(_operator("amx.attention"), args, attrs)


@dataclass(frozen=True)
class Attention:
    """An ``amx.attention`` call taken apart."""

    spec: AttentionSpec
    qkv: relax.Expr
    cache: relax.Expr
    sinks: relax.Expr | None = None
    long: relax.Expr | None = None

    @staticmethod
    def of(call: relax.Call) -> Attention:
        """Take a call apart by its attributes."""
        spec = AttentionSpec.of(call.attrs)
        qkv, cache, *rest = call.args
        sinks = rest.pop(0) if spec.sinks else None
        return Attention(spec, qkv, cache, sinks, rest.pop(0) if rest else None)

    @property
    def rows(self) -> Any:
        """Rows of x, a number or an expression."""
        return self.qkv.ty.shape.values[0]


def packed_attention(
    qkv: relax.Expr, bounds: relax.Expr, positions: relax.Expr, spec: AttentionSpec, causal: bool
) -> relax.Call:
    """Build a call of ``amx.packed_attention``: rows attend to rows of their own text.

    Parameters
    ----------
    qkv : relax.Expr
        [rows, heads + 2 kv_heads, head_dim], not rotated.
    bounds : relax.Expr
        int32 [texts + 1]: the first row of each text, and the end.
    positions : relax.Expr
        int32 [rows]: what the rotation turns by.
    spec : AttentionSpec
        What it computes; keys less than ``window`` positions away are seen.
    causal : bool
        Whether rows see no later ones.

    Returns
    -------
    relax.Call
        [rows, heads, head_dim], of qkv's type.
    """
    attrs = make_node("ir.DictAttrs", causal=int(causal), **spec.attributes())
    return relax.Call(_operator("amx.packed_attention"), [qkv, bounds, positions], attrs)


def mean_rows(x: relax.Expr, spans: relax.Expr) -> relax.Call:
    """Build a call of ``amx.mean_rows``: x [rows, K], spans int32 [n, 2] -> [n, K].

    A span is its first row and the one past its last.
    """
    return relax.Call(_operator("amx.mean_rows"), [x, spans], make_node("ir.DictAttrs"))


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
    lead = _lead(call.args[0])
    if attrs.gathered:
        lead = [lead[0] * attrs.gathered]
    return relax.TensorType([*lead, attrs.out_features], attrs.out_dtype)


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


def _infer_expert_route(call: relax.Call, _ctx: object) -> relax.Type:
    shape = [*_lead(call.args[0]), int(call.attrs["chosen"])]
    return relax.TupleType([relax.TensorType(shape, t) for t in ("int32", "float32")])


def _infer_expert_group(call: relax.Call, _ctx: object) -> relax.Type:
    ids = call.args[0].ty
    bounds = relax.TensorType([int(call.attrs["experts"]) + 1], "int32")
    return relax.TupleType([ids, ids, bounds])


def _infer_expert_combine(call: relax.Call, _ctx: object) -> relax.Type:
    y, shares = (a.ty for a in call.args[:2])
    return relax.TensorType([shares.shape.values[0], y.shape.values[1]], y.dtype)


def _infer_clamped_gate(call: relax.Call, _ctx: object) -> relax.Type:
    x = call.args[0].ty
    return relax.TensorType([*_lead(call.args[0]), x.shape.values[-1] // 2], x.dtype)


def _infer_kv_cache(_call: relax.Call, _ctx: object) -> relax.Type:
    return relax.AnyType()


def _infer_attention(call: relax.Call, _ctx: object) -> relax.Type:
    rows, _, d = call.args[0].ty.shape.values
    return relax.TensorType([rows, int(call.attrs["heads"]), d], call.args[0].ty.dtype)


def _infer_mean_rows(call: relax.Call, _ctx: object) -> relax.Type:
    x, spans = (arg.ty for arg in call.args)
    return relax.TensorType([spans.shape.values[0], x.shape.values[1]], x.dtype)


_INFER = {
    "amx.kv_cache": _infer_kv_cache,
    "amx.attention": _infer_attention,
    "amx.packed_attention": _infer_attention,
    "amx.mean_rows": _infer_mean_rows,
    "amx.expert_route": _infer_expert_route,
    "amx.expert_group": _infer_expert_group,
    "amx.expert_combine": _infer_expert_combine,
    "amx.clamped_gate": _infer_clamped_gate,
    "amx.linear": _infer_linear,
    "amx.expert_matmul": _infer_expert_matmul,
    "amx.quantize_activation": _infer_quantize,
    "amx.embedding": _infer_embedding,
}
