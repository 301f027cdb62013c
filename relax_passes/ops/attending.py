"""Operators of attention, its cache, and of rows that belong to several texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax

from relax_passes.attention_spec import AttentionSpec

from .base import Operator


def _infer_kv_cache(_call: relax.Call, _ctx: object) -> relax.Type:
    return relax.AnyType()


def _infer_attention(call: relax.Call, _ctx: object) -> relax.Type:
    rows, _, d = call.args[0].ty.shape.values
    return relax.TensorType([rows, int(call.attrs["heads"]), d], call.args[0].ty.dtype)


def _infer_mean_rows(call: relax.Call, _ctx: object) -> relax.Type:
    x, spans = (arg.ty for arg in call.args)
    return relax.TensorType([spans.shape.values[0], x.shape.values[1]], x.dtype)


KV_CACHE = Operator("amx.kv_cache", _infer_kv_cache)
ATTENTION = Operator("amx.attention", _infer_attention)
PACKED_ATTENTION = Operator("amx.packed_attention", _infer_attention)
MEAN_ROWS = Operator("amx.mean_rows", _infer_mean_rows)


def kv_cache(sizes: relax.Expr) -> relax.Call:
    """Build a call of ``amx.kv_cache``.

    Parameters
    ----------
    sizes : relax.Expr
        A shape: most sequences, tokens of all sequences, and tokens of one pass.
    """
    return KV_CACHE([sizes])


def attention(
    qkv: relax.Expr,
    cache: relax.Expr,
    spec: AttentionSpec,
    sinks: relax.Expr | None = None,
    long: relax.Expr | None = None,
    norms: tuple[relax.Expr, ...] = (),
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
    norms : tuple of relax.Expr
        [head_dim] each: the weights of the queries' norm and of the keys', where the spec has them.

    Returns
    -------
    relax.Call
        [rows, heads, head_dim], of qkv's type.
    """
    args = [qkv, cache] + ([sinks] if spec.sinks else [])
    args += [long] if spec.long_rotation.pairs else []
    args += norms if spec.norm_eps else ()
    return ATTENTION(args, **spec.attributes())


@dataclass(frozen=True)
class Attention:
    """An ``amx.attention`` call taken apart."""

    spec: AttentionSpec
    qkv: relax.Expr
    cache: relax.Expr
    sinks: relax.Expr | None = None
    long: relax.Expr | None = None
    norms: tuple[relax.Expr, ...] = ()

    @staticmethod
    def of(call: relax.Call) -> Attention:
        """Take a call apart by its attributes."""
        spec = AttentionSpec.of(call.attrs)
        qkv, cache, *rest = call.args
        sinks = rest.pop(0) if spec.sinks else None
        long = rest.pop(0) if spec.long_rotation.pairs else None
        return Attention(spec, qkv, cache, sinks, long, tuple(rest))

    def call(self) -> relax.Call:
        """Build the call again."""
        return attention(self.qkv, self.cache, self.spec, self.sinks, self.long, self.norms)

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
    return PACKED_ATTENTION([qkv, bounds, positions], causal=int(causal), **spec.attributes())


def mean_rows(x: relax.Expr, spans: relax.Expr) -> relax.Call:
    """Build a call of ``amx.mean_rows``: x [rows, K], spans int32 [n, 2] -> [n, K].

    A span is its first row and the one past its last.
    """
    return MEAN_ROWS([x, spans])
