"""``amx.attention`` on CPUs over a cache that stores few bits: two kernels a layer, one in front.

The cache is no object of TVM's: pages and sequences are the runtime's to keep, and functions take
one tuple of tensors, that of `layout.Step`'s names. They store into two of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax, tirx

from relax_passes.attention_spec import AttentionSpec
from relax_passes.cache_spec import CacheSpec
from relax_passes.kernels.cpu.attention.config import KVCacheConfig
from relax_passes.ops import Attention
from relax_passes.rewriting import Context

from .kernels import attend
from .layout import FIELDS, PAGE, Layout, Step
from .leave import leave
from .store import store

_ITEM = "vm.builtin.tuple_getitem"


class PackedAttention:
    """Lowers the attention of one model.

    Parameters
    ----------
    specs : tuple of AttentionSpec
        All layers.
    target : tvm.target.Target
        What is compiled for.
    spec : CacheSpec
        How keys and values are rounded.

    Raises
    ------
    ModelError
        For heads that do not fit the groups.
    """

    def __init__(self, specs: tuple[AttentionSpec, ...], target: Any, spec: CacheSpec) -> None:
        spec.check(specs[0].head_dim)
        self.target = target
        self.layout = Layout(spec, len(specs), specs[0].kv_heads, specs[0].head_dim)
        self._functions: dict[Any, Any] = {}
        self._step: list[relax.Expr] = []

    def begin(self, ctx: Context, rows: Any, cache: relax.Expr) -> None:
        """Take the tuple of a function apart."""
        layout = self.layout
        heads = (layout.layers, layout.kv_heads)
        counts = {n: tirx.Var(n, "int64") for n in ("sequences", "most", "pages", "places")}
        shapes = {
            "rows": ((2, rows), "int32"),
            "sequences": ((counts["sequences"], FIELDS), "int32"),
            "tables": ((counts["sequences"], counts["most"]), "int32"),
            "pages": ((counts["pages"], *heads, layout.block), "uint8"),
            "recent": ((counts["places"], *heads, layout.recent), "float16"),
        }
        self._step = []
        for i, name in enumerate(Step.NAMES):
            item = relax.call_pure_packed(
                _ITEM, cache, relax.prim_value(i), ty_args=relax.TensorType(*shapes[name])
            )
            self._step.append(ctx.emit(item, name))
        first = self._function(ctx, "leave", None, lambda: leave(layout, self.target))
        told = relax.TensorType((2, rows), "int32")
        self._step[0] = ctx.emit(relax.call_tir(first, self._step, told), "rows")

    def cache(self, ctx: Context, sizes: relax.ShapeExpr) -> relax.Expr:
        """Return pages for so many tokens, and the place of sequences' tokens in 16 bits."""
        layout, (sequences, tokens, _) = self.layout, sizes.values
        heads = (layout.layers, layout.kv_heads)
        pages = (tokens + (PAGE - 1)) // PAGE + 1  # TVM's object has one more, too
        made = []
        for count, size, dtype in (
            (pages, layout.block, "uint8"),
            (sequences, layout.recent, "float16"),
        ):
            shape = relax.ShapeExpr([count, *heads, size])
            made.append(ctx.emit(relax.op.builtin.alloc_tensor(shape, dtype, 0), "store"))
        return relax.Tuple(made)

    def attend(self, ctx: Context, asked: Attention) -> relax.Expr:
        """Return the attention of one layer."""
        spec, rows = asked.spec, asked.rows
        alike = replace(spec, layer=0, sinks=False)
        config = KVCacheConfig((alike,))
        layer = relax.prim_value(tirx.const(spec.layer, "int64"))
        turns = replace(alike, window=0, scale=1.0, soft_cap=0.0)
        first = self._function(ctx, "store", turns, lambda: store(self.layout, config))
        second = self._function(
            ctx,
            "attend",
            (replace(alike, rotation=replace(spec.rotation, frequencies=())), spec.sinks),
            lambda: attend(self.layout, config, self.target, spec.sinks),
        )

        def heads(count: int) -> relax.TensorType:
            return relax.TensorType((rows, count, spec.head_dim), "float32")

        types = [heads(spec.heads), heads(spec.kv_heads), heads(spec.kv_heads)]
        stored = ctx.emit(relax.call_tir(first, [asked.qkv, *self._step, layer], types), "stored")
        parts = [ctx.emit(relax.TupleGetItem(stored, i), "part") for i in range(3)]
        sinks = [asked.sinks] if spec.sinks else []
        given = [*parts, *self._step, *sinks, layer]
        return relax.call_tir(second, given, heads(spec.heads))

    def _function(self, ctx: Context, name: str, key: Any, build: Any) -> Any:
        if (name, key) not in self._functions:
            self._functions[name, key] = ctx.add_function(build(), f"kv_cache_{name}")
        return self._functions[name, key]
