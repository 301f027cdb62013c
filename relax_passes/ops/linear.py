"""Operators of quantized linears: products, activations and tables of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm import relax

from relax_passes.activation import FLOAT32, Activation, Buffers

from .base import Operator, lead, read


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
    chosen: int = 0
    over_all: bool = False
    joined: bool = False
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
    # Or "rms_norm" (x, weight), "silu_mul", "gelu_mul" (gate, up), "gelu", "gelu_tanh".
    prologue: str = "none"
    eps: float = 0.0


@dataclass(frozen=True)
class EmbeddingAttrs:
    """Attributes of ``amx.embedding``: a packed table [rows, k]."""

    rows: int
    k: int
    format: str
    layout: str
    out_dtype: str = "float32"


def _infer_linear(call: relax.Call, _ctx: object) -> relax.Type:
    attrs = read(LinearAttrs, call)
    axes = lead(call.args[0])
    if attrs.gathered:
        axes = [axes[0] * attrs.gathered]
    if attrs.joined:
        axes = [1]
    return relax.TensorType([*axes, attrs.out_features], attrs.out_dtype)


def _infer_quantize(call: relax.Call, _ctx: object) -> relax.Type:
    attrs = quantize_attrs(call)
    axes = lead(call.args[0])
    return relax.TupleType(
        [relax.TensorType([*axes, *shape], dtype) for _, shape, dtype in activation_parts(attrs)]
    )


def _infer_embedding(call: relax.Call, _ctx: object) -> relax.Type:
    attrs = embedding_attrs(call)
    return relax.TensorType([*call.args[0].ty.shape.values, attrs.k], attrs.out_dtype)


LINEAR = Operator("amx.linear", _infer_linear)
QUANTIZE_ACTIVATION = Operator("amx.quantize_activation", _infer_quantize)
EMBEDDING = Operator("amx.embedding", _infer_embedding)


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
        attrs = read(LinearAttrs, call)
        args = list(call.args)
        x, args = args[: attrs.num_x], args[attrs.num_x :]
        w, args = args[: attrs.num_w], args[attrs.num_w :]
        bias = args.pop(0) if attrs.bias else None
        residual = args.pop(0) if attrs.residual else None
        sourced = attrs.gathered and not (attrs.listed or attrs.chosen)
        source = args.pop(0) if sourced else None
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
        return LINEAR([*self.x, *self.weights, *extra], attrs)


def quantize_activation(args: Sequence[relax.Expr], attrs: QuantizeAttrs) -> relax.Call:
    """Build a call of ``amx.quantize_activation``."""
    return QUANTIZE_ACTIVATION(args, attrs)


def quantize_attrs(call: relax.Call) -> QuantizeAttrs:
    """Read the attributes of an ``amx.quantize_activation`` call."""
    return read(QuantizeAttrs, call)


def embedding(ids: relax.Expr, weights: Sequence[relax.Expr], attrs: EmbeddingAttrs) -> relax.Call:
    """Build a call of ``amx.embedding``: ids int32 [..] and the table's packed parts."""
    return EMBEDDING([ids, *weights], attrs)


def embedding_attrs(call: relax.Call) -> EmbeddingAttrs:
    """Read the attributes of an ``amx.embedding`` call."""
    return read(EmbeddingAttrs, call)


def activation_parts(attrs: QuantizeAttrs) -> Buffers:
    """List the tensors of a quantized activation as (name, shape after the leading axes, dtype).

    The kernels' own description of their arguments is the only source of this.
    """
    return attrs.scheme.buffers(attrs.k, attrs.sums)
