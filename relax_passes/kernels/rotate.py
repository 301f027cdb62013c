"""Rotation of queries and keys as operators of their own, where the cache does not do it.

A cache object rotates all layers alike. Where they differ, each function asks the cache for the
positions once, makes one table of cosines and sines for each rotary embedding, and rotates in front
of the attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te, tirx

from relax_passes.attention_spec import Rotation
from relax_passes.ops import Attention
from relax_passes.rewriting import Context

Tables = tuple[relax.Expr, relax.Expr]


class Turning:
    """Rotates in one function, with tables that its layers share.

    Parameters
    ----------
    ctx : Context
        The function.
    rows : PrimExpr or int
        Rows of its hidden states.
    cache : relax.Expr
        The cache's object, which knows their positions.
    """

    def __init__(self, ctx: Context, rows: Any, cache: relax.Expr) -> None:
        self._ctx, self._rows, self._cache = ctx, rows, cache
        self._tables: dict[tuple[Rotation, Rotation], Tables] = {}
        self._positions: relax.Expr | None = None

    def turn(self, asked: Attention) -> relax.Expr:
        """Return qkv [rows, heads + 2 kv_heads, head_dim] with queries and keys rotated."""
        spec, ctx = asked.spec, self._ctx
        if not spec.rotation.pairs:
            return asked.qkv
        if self._positions is None:
            found = relax.call_pure_packed(
                "vm.builtin.attention_kv_cache_get_query_positions",
                self._cache,
                ty_args=relax.TensorType((self._rows,), "int32"),
            )
            self._positions = ctx.emit(found, "positions")
        key = (spec.rotation, spec.long_rotation)
        if key not in self._tables:
            self._tables[key] = self._make(*key, asked.long)
        heads = spec.heads + spec.kv_heads
        return ctx.emit(ctx.call_te(rotate, asked.qkv, *self._tables[key], heads), "rotated")

    def _make(self, turn: Rotation, other: Rotation, long: relax.Expr | None) -> Tables:
        """Make cosines and sines, float32 [rows, pairs]; those of `other` where `long` is 1."""
        ctx = self._ctx
        column = ctx.emit(relax.op.astype(self._positions, "float32"))
        column = ctx.emit(relax.op.reshape(column, (self._rows, 1)))
        frequencies = relax.const(np.asarray([turn.frequencies], np.float32))
        if long is not None:
            both = np.asarray([turn.frequencies, other.frequencies], np.float32)
            frequencies = ctx.emit(relax.op.take(relax.const(both), long, axis=0))
        angles = ctx.emit(relax.op.multiply(column, frequencies))

        def table(name: str) -> relax.Expr:
            function = getattr(tirx, name)

            def build(angle: te.Tensor) -> te.Tensor:
                return te.compute(
                    angle.shape, lambda t, i: function(angle[t, i]) * turn.factor, name
                )

            return ctx.emit(ctx.call_te(build, angles, name=f"rope_{name}"), name)

        return table("cos"), table("sin")


def rotate(value: te.Tensor, cos: te.Tensor, sin: te.Tensor, heads: int) -> te.Tensor:
    """Rotate the first heads of [rows, all heads, d]; channel i < pairs turns with i + pairs."""
    half, dtype = int(cos.shape[1]), value.dtype

    def at(t, h, i):  # noqa: ANN001, ANN202
        def single(index):  # noqa: ANN001, ANN202
            return value[t, h, index].astype("float32")

        low = single(i) * cos[t, i] - single(i + half) * sin[t, i]
        high = single(i) * cos[t, i - half] + single(i - half) * sin[t, i - half]
        kept = tirx.any(h >= heads, i >= 2 * half)
        rotated = tirx.if_then_else(i < half, low.astype(dtype), high.astype(dtype))
        return tirx.if_then_else(kept, value[t, h, i], rotated)

    return te.compute(value.shape, at, "rotate")
