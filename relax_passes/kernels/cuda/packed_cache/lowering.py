"""``amx.attention`` on CUDA over a cache that stores few bits.

The runtime keeps pages and sequences. A function takes one tuple, of the tensor in which a step is
told of its sequences, and the cache's state as a parameter: see `layout`. Each pass begins with the
kernels of `begin`; decode steps then call one kernel a layer, others two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax, tirx

from amx_tvm.targets.cuda.target import gpu_of
from relax_passes.attention_spec import NONE, AttentionSpec
from relax_passes.cache_spec import CacheSpec
from relax_passes.kernels.cuda.attention import cache as pages
from relax_passes.kernels.cuda.attention.config import check
from relax_passes.ops import Attention
from relax_passes.rewriting import EACH, STATE, Context, marked

from . import kernels
from .items import Items
from .layout import FIELDS, HEADER, PAGE, layout_of
from .state_text import STATE_WORDS

STATE_TYPE = relax.TensorType((STATE_WORDS,), "int32")
_ITEM = "vm.builtin.tuple_getitem"


def begin(ctx: Context, cache: relax.Expr, rows: Any, state: relax.Expr, kernel: Any) -> relax.Var:
    """Emit the call that begins a pass; returns the `token` argument of the other kernels.

    Parameters
    ----------
    ctx : Context
        The function.
    cache : Expr
        The tuple of what the step is told.
    rows : PrimExpr or int
        New tokens, of all sequences.
    state : Expr
        The cache's state.
    kernel : GlobalVar
        Of `kernels.begin`.
    """
    told = relax.TensorType((tirx.Var("words", "int64"),), "int32")
    item = relax.call_pure_packed(_ITEM, cache, relax.prim_value(0), ty_args=told)
    token, told = ctx.emit(pages.token(rows), "token"), ctx.emit(item, "told")
    return ctx.emit(relax.call_tir(kernel, [token, state, told], pages.token_type(rows)), "begun")


class PackedCudaAttention:
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
        For heads that no kernel computes.
    """

    def __init__(self, specs: tuple[AttentionSpec, ...], target: Any, spec: CacheSpec) -> None:
        for layer in specs:
            check(layer)
        gpu = gpu_of(target)
        self.arch, self.layout = gpu.arch, layout_of(spec, specs)
        windows = tuple(sorted({layer.window for layer in specs}))
        self.items = Items(specs[0], windows, gpu, self.layout)
        self._functions: dict[Any, Any] = {}
        self._token: relax.Expr | None = None

    def begin(self, ctx: Context, rows: Any, cache: relax.Expr) -> None:
        """Begin a pass of a function."""
        if "begin" not in self._functions:
            self._functions["begin"] = ctx.add_function(kernels.begin(self.items), kernels.PLAN)
        state = ctx.parameter(STATE, STATE_TYPE)
        self._token = begin(ctx, cache, rows, state, self._functions["begin"])

    def cache(self, ctx: Context, sizes: relax.ShapeExpr) -> relax.Expr:
        """Return the state, what a step is told in, pages, tokens in 16 bits, and tables."""
        sequences, tokens, rows = sizes.values
        count = (tokens + (PAGE - 1)) // PAGE + 1  # TVM's object has one more, too
        bytes_ = self.layout
        words = HEADER + sequences * (FIELDS + count + 1) + 2 * rows

        def made(name: str, dtype: str, *shape: Any) -> relax.Var:
            tensor = relax.op.builtin.alloc_tensor(relax.ShapeExpr(list(shape)), dtype, 0)
            return ctx.emit(tensor, name)

        tensors = [
            made("pages", "uint8", count, bytes_.page_bytes),
            made("recent", "float16", sequences, bytes_.sequence_bytes // 2),
            made("told", "int32", words),
            made("work", "int32", -(-self.items.bytes // 4)),
        ]
        setup = ctx.add_function(kernels.setup(self.layout), "packed_setup")
        state = ctx.emit(relax.call_tir(setup, tensors, STATE_TYPE), "state")
        return relax.Tuple([state, *tensors])

    def attend(self, ctx: Context, asked: Attention) -> relax.Expr:
        """Return the attention of one layer; kernels know one rotation, of short sequences."""
        spec, rows = asked.spec, asked.rows
        alike = replace(spec, layer=0, long_rotation=NONE)
        given = [self._token, ctx.parameter(STATE, STATE_TYPE)]
        sinks = [asked.sinks] if asked.sinks is not None else []
        layer = relax.prim_value(tirx.const(spec.layer, "int64"))

        def heads(count: int) -> relax.TensorType:
            return relax.TensorType([rows, count, spec.head_dim], "float16")

        def function(name: str, build: Any, *more: Any) -> Any:
            key = (name, alike)
            if key not in self._functions:
                made = build(alike, *more)
                self._functions[key] = ctx.add_function(made, f"attention_{name}")
            return self._functions[key]

        out = heads(spec.heads)
        if marked(ctx.function, EACH):
            batch = function("batch", kernels.batch, self.items)
            return relax.call_tir(batch, [asked.qkv, *given, *sinks, layer], out)
        store = function("store", kernels.store, self.layout)
        types = [out, heads(spec.kv_heads), heads(spec.kv_heads)]
        stored = ctx.emit(relax.call_tir(store, [asked.qkv, *given, layer], types), "stored")
        parts = [ctx.emit(relax.TupleGetItem(stored, i), "part") for i in range(3)]
        prefill = function("prefill", kernels.prefill, self.layout, self.arch)
        return relax.call_tir(prefill, [*parts, *given, *sinks, layer], out)
