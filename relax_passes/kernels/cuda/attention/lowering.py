"""``amx.attention`` on CUDA: kernels of this package, behind one call of TVM's cache object a pass.

Functions in which every row is the next token of a sequence of its own (`EACH`) call one kernel a
layer, others two; where these are many sequences, a step begins with its plan. What the kernels
read of the cache is the parameter `state`, which no step changes: see `cache`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax, tirx

from amx_tvm.targets.cuda.target import gpu_of
from relax_passes.attention_spec import NONE, AttentionSpec
from relax_passes.ops import Attention
from relax_passes.rewriting import EACH, STATE, Context, marked

from . import cache as pages
from . import kernels
from .batch_text import Batches
from .config import MOST_SEQUENCES, check, page_elements, stored_channels
from .state_text import STATE_WORDS

STATE_TYPE = relax.TensorType((STATE_WORDS,), "int32")


class CudaAttention:
    """Lowers the attention of one model.

    Parameters
    ----------
    specs : tuple of AttentionSpec
        All layers.
    target : tvm.target.Target
        What is compiled for.

    Raises
    ------
    ModelError
        For heads that no kernel computes.
    """

    def __init__(self, specs: tuple[AttentionSpec, ...], target: Any) -> None:
        for spec in specs:
            check(spec)
        self.layers, gpu = len(specs), gpu_of(target)
        self.arch = gpu.arch
        windows = tuple(sorted({spec.window for spec in specs}))
        self.batches = Batches(specs[0], windows, gpu)
        elements = page_elements(specs[0], len(specs))
        self.store = pages.Store(elements, self.batches.pages_at, 4 * MOST_SEQUENCES)
        self._functions: dict[Any, Any] = {}
        self._token: relax.Expr | None = None

    def begin(self, ctx: Context, rows: Any, cache: relax.Expr) -> None:
        """Emit the call that tells the kernels of a function where this pass's pages are."""
        self._token = pages.begin(ctx, cache, rows)
        if _many(ctx.function, rows):
            self._token = ctx.emit(self.plan(ctx, self._token, ctx.parameter(STATE, STATE_TYPE)))

    def plan(self, ctx: Context, token: relax.Expr, state: relax.Expr) -> relax.Expr:
        """Return the call that begins a step of many sequences."""
        if "plan" not in self._functions:
            self._functions["plan"] = ctx.add_function(kernels.plan(self.batches), kernels.PLAN)
        return relax.call_tir(self._functions["plan"], [token, state], token.ty)

    def cache(self, ctx: Context, sizes: relax.ShapeExpr) -> relax.Expr:
        """Return the cache's object and its state."""
        return relax.Tuple(pages.create(ctx, self.store, sizes))

    def attend(self, ctx: Context, asked: Attention) -> relax.Expr:
        """Return the attention of one layer; kernels know one rotation, of short sequences."""
        spec, qkv, rows = asked.spec, asked.qkv, asked.rows
        alike = replace(spec, layer=0, long_rotation=NONE)
        out = relax.TensorType([rows, spec.heads, spec.head_dim], "float16")
        given = [self._token, ctx.parameter(STATE, STATE_TYPE)]
        sinks, norms = [asked.sinks] if asked.sinks is not None else [], list(asked.norms)
        layer = relax.prim_value(tirx.const(spec.layer, "int64"))

        def call(
            name: str,
            x: relax.Expr,
            build: Any,
            *more: Any,
            args: Any = sinks + norms,
            out: Any = out,
        ) -> relax.Expr:
            key = (name, alike, *more)
            if key not in self._functions:
                made = build(alike, self.layers, *more)
                self._functions[key] = ctx.add_function(made, f"attention_{name}")
            return relax.call_tir(self._functions[key], [x, *given, *args, layer], out)

        if marked(ctx.function, EACH):
            if _many(ctx.function, rows):
                return call("batch", qkv, kernels.batch, self.batches)
            return call("decode", qkv, kernels.decode, self.arch)
        stored = relax.TensorType([rows, spec.heads, stored_channels(spec.head_dim)], "float16")
        q = ctx.emit(call("store", qkv, kernels.store, args=norms, out=stored), "q")
        return call("prefill", q, kernels.prefill, self.arch, args=sinks)


def _many(function: relax.Function, rows: Any) -> bool:
    """Whether a function takes the next tokens of any number of sequences."""
    return marked(function, EACH) and not isinstance(rows, tirx.IntImm)
