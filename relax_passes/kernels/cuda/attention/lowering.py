"""``amx.attention`` on CUDA: kernels of this package, behind one call of TVM's cache object a pass.

Functions in which every row is the next token of a sequence of its own (`EACH`) call one kernel a
layer, others two. What the kernels read of the cache is the parameter `state`, which no step
changes: see `cache`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax, tirx

from relax_passes.attention_spec import NONE, AttentionSpec
from relax_passes.ops import Attention
from relax_passes.rewriting import EACH, STATE, Context, marked

from . import cache as pages
from . import kernels
from .config import page_elements
from .state_text import STATE_WORDS

STATE_TYPE = relax.TensorType((STATE_WORDS,), "int32")


class CudaAttention:
    """Lowers the attention of one model.

    Parameters
    ----------
    specs : tuple of AttentionSpec
        All layers.
    arch : str
        Architecture, such as "sm_90a".
    """

    def __init__(self, specs: tuple[AttentionSpec, ...], arch: str) -> None:
        self.layers, self.arch = len(specs), arch
        self.elements = page_elements(specs[0], len(specs))
        self._functions: dict[Any, Any] = {}
        self._token: relax.Expr | None = None

    def begin(self, ctx: Context, rows: Any, cache: relax.Expr) -> None:
        """Emit the call that tells the kernels of a function where this pass's pages are."""
        self._token = pages.begin(ctx, cache, rows)

    def cache(self, ctx: Context, sizes: relax.ShapeExpr) -> relax.Expr:
        """Return the cache's object and its state."""
        return relax.Tuple(pages.create(ctx, self.elements, sizes))

    def attend(self, ctx: Context, asked: Attention) -> relax.Expr:
        """Return the attention of one layer; kernels know one rotation, of short sequences."""
        spec, qkv, rows = asked.spec, asked.qkv, asked.rows
        alike = replace(spec, layer=0, long_rotation=NONE)
        out = relax.TensorType([rows, spec.heads, spec.head_dim], "float16")
        given = [self._token, ctx.parameter(STATE, STATE_TYPE)]
        layer = relax.prim_value(tirx.const(spec.layer, "int64"))

        def call(name: str, x: relax.Expr, build: Any, *more: Any) -> relax.Expr:
            key = (name, alike, *more)
            if key not in self._functions:
                made = build(alike, self.layers, *more)
                self._functions[key] = ctx.add_function(made, f"attention_{name}")
            return relax.call_tir(self._functions[key], [x, *given, layer], out)

        if marked(ctx.function, EACH):
            m = int(rows) if isinstance(rows, tirx.IntImm) else None
            return call("decode", qkv, kernels.decode, self.arch, m)
        q = ctx.emit(call("store", qkv, kernels.store), "q")
        return call("prefill", q, kernels.prefill, self.arch)
