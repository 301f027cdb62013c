"""The paged KV cache of CUDA targets: TVM's object decides about pages, this package fills them.

``vm.builtin.paged_attention_kv_cache_create`` keeps sequences, forks and page tables. It is made
with one layer of four numbers a token, since it never has to see a key; the real pages, all layers
of a token together, travel with it as the tensor that it hands to its rotation function. Once a
forward pass the model calls the object's attention, and the callbacks note where page tables and
pages are in the state in front of the pages (state_text); the layers' own kernels take that as an
argument. So one call a step stays outside the CUDA graph instead of one a layer, and engines of one
library share nothing.

Not supported, and refused by the callbacks: token trees, reading the cache back for debugging.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.frontend.nn.llm.kv_cache import AttnKind, RopeMode
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, at
from relax_passes.rewriting import Context

from .config import PAGE_TOKENS, TOKEN
from .state_text import (
    COPY_PAGE,
    STATE_BEGIN,
    STATE_LIST,
    STATE_ROWS,
    STATE_SLOTS,
    STATE_WORDS,
)

BEGIN = "vm.builtin.attention_kv_cache_attention_with_fused_qkv"  # here: runs the callbacks
_SCALARS = (
    ("rotary_mode", "int32"),
    ("rope_scale", "float32"),
    ("rope_theta", "float32"),
    ("sm_scale", "float32"),
)


@dataclass(frozen=True)
class Store:
    """The tensor of the pages: a row with the state, the pages, and tables that begin a row.

    Parameters
    ----------
    elements : int
        float16 numbers of a page of all layers, which is a row.
    fixed, each : int
        Bytes of the tables: of their own, and for each page.
    """

    elements: int
    fixed: int
    each: int

    def rows(self, pages: Any) -> Any:
        """Return rows for so many pages; the tables have room for as many as there are rows."""
        row = 2 * self.elements
        return ((pages + 2) * row + self.fixed) // (row - self.each) + 1

    def tables(self, rows: Any) -> Any:
        """Return where the tables of a tensor of so many rows begin, in bytes."""
        row = 2 * self.elements
        return (rows - (rows * self.each + self.fixed + row - 1) // row) * row


def create(ctx: Context, layout: Store, sizes: rx.ShapeExpr) -> tuple[rx.Expr, rx.Expr]:
    """Create a paged KV cache for the kernels of this package.

    Parameters
    ----------
    ctx : Context
        The function that creates it, and its module, which gets the callbacks.
    layout : Store
        The tensor of the pages.
    sizes : ShapeExpr
        Most sequences, tokens of all sequences, tokens of one forward pass.

    Returns
    -------
    (Expr, Expr)
        The object, and what the kernels take as `state`: int32 [STATE_WORDS].
    """
    # TVM's object counts one page more than the tokens need
    pages = (sizes.values[1] + (PAGE_TOKENS - 1)) // PAGE_TOKENS + 1
    shape = rx.ShapeExpr([layout.rows(pages), layout.elements])
    store = ctx.emit(_allocate(shape), "pages")
    start = rx.prim_value(tirx.const(0, "int64"))
    state = ctx.emit(rx.op.memory.view(store, [STATE_WORDS], "int32", start), "state")
    made = rx.call_pure_packed(
        "vm.builtin.paged_attention_kv_cache_create",
        *_arguments(ctx, layout, sizes, store),
        ty_args=rx.AnyType(),
    )
    return ctx.emit(made, "paged_kv_cache"), state


def begin(ctx: Context, cache: rx.Expr, rows: tirx.PrimExpr | int) -> rx.Var:
    """Have the cache's callbacks note where the pages of a pass are.

    Parameters
    ----------
    ctx : Context
        The function.
    cache : Expr
        The cache's object.
    rows : PrimExpr or int
        New tokens, of all sequences.

    Returns
    -------
    Var
        The `token` argument of the kernels, float16 [rows, 1, TOKEN].
    """
    nothing = ctx.emit(_allocate(rx.ShapeExpr([rows, 3, TOKEN])), "nothing")
    arguments = [cache, rx.prim_value(0), rx.prim_value(1.0), nothing]
    return ctx.emit(rx.call_dps_packed(BEGIN, arguments, out_ty=token_type(rows)), "token")


def token_type(rows: tirx.PrimExpr | int) -> rx.TensorType:
    """Return the type of the `token` argument of the kernels."""
    return rx.TensorType((rows, 1, TOKEN), "float16")


def token(rows: tirx.PrimExpr | int) -> rx.Expr:
    """Return what stands for the token in a function that another one begins for."""
    return _allocate(rx.ShapeExpr([rows, 1, TOKEN]))


def _allocate(shape: rx.ShapeExpr) -> rx.Expr:
    return rx.op.builtin.alloc_tensor(shape, "float16", 0)


def _arguments(ctx: Context, layout: Store, sizes: rx.ShapeExpr, store: rx.Expr) -> list:
    """Arguments of the runtime's constructor, in its order."""

    def add(name: str, function: tirx.PrimFunc) -> Any:
        return ctx.add_function(function, f"kv_cache_{name}")

    def backend(name: str, function: tirx.PrimFunc) -> rx.Expr:
        return rx.Tuple([tvm.ir.StringImm("tirx"), add(name, function)])

    none = rx.Tuple([])
    return [
        rx.ShapeExpr([*sizes.values, PAGE_TOKENS, 0, 1]),
        rx.ShapeExpr([0, 1]),
        rx.prim_value(1),
        rx.prim_value(1),
        rx.prim_value(TOKEN),
        rx.prim_value(TOKEN),
        rx.ShapeExpr([int(AttnKind.MHA)]),
        rx.prim_value(False),  # no disaggregation
        rx.prim_value(int(RopeMode.NORMAL)),  # the mode that hands on a tensor
        rx.prim_value(1),
        rx.prim_value(10000.0),
        store,
        rx.const(0.0, "float16"),
        add("slots", slots()),
        rx.prim_value(0),  # no MLA append
        backend("rows", sequences()),
        backend("list_prefill", page_list(prefill=True)),
        backend("list_decode", page_list(prefill=False)),
        none,  # windows are the kernels' own business
        none,
        none,  # no token trees
        none,
        none,  # no MLA prefill
        rx.Tuple([add("nothing_merge", nothing(4, ()))]),
        add("begin", first(layout)),
        add("copy_page", copy_page(layout.elements)),
        add("refuse_debug", refuse("reading the CUDA cache back", 4, (("layer", "int64"),))),
        add("refuse_trees", refuse("a token tree in the CUDA cache", 3, (("batch", "int32"),))),
    ]


def _causal() -> tuple[tuple[str, str], ...]:
    return (("causal", "int32"), *_SCALARS)


def _callback(name: str, body: Callable[[], None]) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            body()
    return builder.get().without_attr("global_symbol")  # the module names it


def _handles(*names: str) -> list:
    return [T.arg(name, T.handle()) for name in names]


def _scalars(scalars: tuple[tuple[str, str], ...]) -> None:
    for name, dtype in scalars:
        T.arg(name, getattr(T, dtype)())


def _indices(handle, count) -> tirx.Buffer:  # noqa: ANN001
    """An int32 vector of the runtime: a view somewhere inside one allocation."""
    return T.match_buffer(handle, (count,), "int32", elem_offset=T.int32())


def _tell(function: Intrinsic, *args) -> None:
    """Run a function on one thread of the device."""
    with T.frame_scope(
        [T.thread_binding(1, thread="blockIdx.x"), T.thread_binding(1, thread="threadIdx.x")]
    ):
        with T.sblock("tell"):
            T.reads()
            T.writes()
            function(*args)


def _carrier(handle) -> tirx.Expr:  # noqa: ANN001
    """Address of the object's own q or k, whose first eight bytes are the state's address."""
    buffer = T.match_buffer(handle, (T.int32(), 1, TOKEN), "float16")
    zero = tirx.const(0, "int32")
    return at(buffer, zero, zero, zero)


def _own(handle) -> tirx.Expr:  # noqa: ANN001
    """Address of the object's own pages."""
    shape = (T.int64(), 2, 1, PAGE_TOKENS, TOKEN)
    buffer = T.match_buffer(handle, shape, "float16")
    return at(buffer, *(tirx.const(0, "int64") for _ in range(5)))


def first(layout: Store) -> tirx.PrimFunc:
    """Build the callback in the rotation's place: notes pages and positions, and starts afresh."""

    def body() -> None:
        qkv, found, q, k, v, pages = _handles("qkv", "positions", "q", "k", "v", "pages")
        n = T.int32()
        positions = _indices(found, n)
        rows = T.int64()
        store = T.match_buffer(pages, (rows, layout.elements), "float16")
        zero = tirx.const(0, "int32")
        carriers = (_carrier(q), _carrier(k))
        place = (at(store, zero, zero), tirx.const(layout.elements, "int64"), layout.tables(rows))
        _tell(STATE_BEGIN, *place, tirx.Cast("int32", rows), at(positions, zero), n, *carriers)

    return _callback("kv_cache_begin", body)


def slots() -> tirx.PrimFunc:
    """Build the callback in append's place: notes the slots of several new tokens."""

    def body() -> None:
        own, k, _, found = _handles("own_pages", "k", "v", "slots")
        n = T.int32()
        slots = _indices(found, n)
        k, own = _carrier(k), _own(own)
        with T.If(n > 1):  # one token's slot follows from the lists
            with T.Then():
                _tell(STATE_SLOTS, k, own, at(slots, tirx.const(0, "int32")))

    return _callback("kv_cache_slots", body)


def sequences() -> tirx.PrimFunc:
    """Build the callback in the place of attention among the new tokens: notes whose they are."""

    def body() -> None:
        q, found, *_ = _handles("q", "rows", *"kv", "key_rows", "at", "starts", "output", "lse")
        _scalars(_causal())
        n = T.int32()
        rows = _indices(found, n)
        _tell(STATE_ROWS, _carrier(q), at(rows, tirx.const(0, "int32")), n - 1)

    return _callback("kv_cache_rows", body)


def page_list(prefill: bool) -> tirx.PrimFunc:
    """Build the callback in attention's place: notes one list of pages for each sequence."""

    def body() -> None:
        names = ["q", *(["rows"] if prefill else []), "own_pages", "starts", "pages", "lengths"]
        names += ["k_positions", "q_positions", "output", "lse"]
        handles = dict(zip(names, _handles(*names), strict=True))
        _scalars(_causal() if prefill else _SCALARS)
        n, count = T.int32(), T.int32()
        starts = _indices(handles["starts"], n)
        pages = _indices(handles["pages"], count)
        zero = tirx.const(0, "int32")
        rows = tirx.reinterpret("handle", tirx.const(0, "uint64"))
        if prefill:
            rows = at(_indices(handles["rows"], n), zero)
        object_ = (_carrier(handles["q"]), _own(handles["own_pages"]))
        _tell(STATE_LIST, *object_, at(starts, zero), at(pages, zero), rows, n - 1)

    return _callback("kv_cache_list", body)


def copy_page(elements: int) -> tirx.PrimFunc:
    """Build the copy of a page, of all layers, for a fork: own pages, source, target, length."""
    words = elements // 8

    def body() -> None:
        (own,) = _handles("own_pages")
        source, target = T.arg("source", T.int64()), T.arg("target", T.int64())
        T.arg("length", T.int64())
        own = _own(own)
        threads = [
            T.thread_binding(-(-words // 256), thread="blockIdx.x"),
            T.thread_binding(256, thread="threadIdx.x"),
        ]
        with T.frame_scope(threads) as (block, thread):
            with T.sblock("copy"):
                T.reads()
                T.writes()
                size = tirx.const(words, "int64")
                index = tirx.Cast("int64", block * 256 + thread)
                COPY_PAGE(own, size, source, target, index)

    return _callback("kv_cache_copy_page", body)


def nothing(handles: int, scalars: tuple[tuple[str, str], ...]) -> tirx.PrimFunc:
    """Build a callback that has nothing to do: what it would compute, the layers' kernels do."""

    def body() -> None:
        _handles(*(f"a{i}" for i in range(handles)))
        _scalars(scalars)
        T.evaluate(tirx.const(0, "int32"))

    return _callback("kv_cache_nothing", body)


def refuse(what: str, handles: int, scalars: tuple[tuple[str, str], ...]) -> tirx.PrimFunc:
    """Build a callback that stops with an error."""

    def body() -> None:
        _handles(*(f"a{i}" for i in range(handles)))
        _scalars(scalars)
        with T.Assert(tirx.const(False, "bool"), f"{what} is not supported"):
            T.evaluate(tirx.const(0, "int32"))

    return _callback("kv_cache_refuse", body)
