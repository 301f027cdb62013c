"""The paged KV cache of CUDA targets: TVM's object decides about pages, this package fills them.

``vm.builtin.paged_attention_kv_cache_create`` keeps sequences, forks and page tables. It is made
with one layer of one number a token, since it never has to see a key; the real pages, all layers of
a token together, travel with it as the tensor that it hands to its rotation function. Once a
forward pass the model calls the object's attention, and the callbacks note where page tables and
pages are (state_text); the layers' own kernels read that. So one call a step stays outside the
CUDA graph instead of one a layer.

Not supported, and refused by the callbacks: token trees, reading the cache back for debugging.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor
from tvm.relax.frontend.nn.llm.kv_cache import AttnKind, PagedKVCache, RopeMode
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from relax_passes.kernels.cuda.intrinsics import at, call

from .config import PAGE_TOKENS, AttentionConfig
from .state_text import STATE

_SCALARS = (
    ("rotary_mode", "int32"),
    ("rope_scale", "float32"),
    ("rope_theta", "float32"),
    ("sm_scale", "float32"),
)


class CudaPagedKVCache(PagedKVCache):
    """A paged KV cache for the kernels of this package.

    Construct it inside an ``nn.Module`` method while it is exported. ``token_size`` is the number
    of features that a model passes to `begin`, a row.
    """

    def __init__(
        self,
        config: AttentionConfig,
        token_size: int,
        max_batch_size: tirx.Var,
        max_total_seq_len: tirx.Var,
        prefill_chunk_size: tirx.Var,
        name: str = "paged_kv_cache",
    ) -> None:
        # TVM's object counts one page more than the tokens need
        pages = (max_total_seq_len + (PAGE_TOKENS - 1)) // PAGE_TOKENS + 1
        store = nn.op.empty((pages, config.page_elements), "float16")
        capacity = (max_batch_size, max_total_seq_len, prefill_chunk_size)
        super().__init__(
            _expr=rx.call_pure_packed(
                "vm.builtin.paged_attention_kv_cache_create",
                *_arguments(config, token_size, capacity, store._expr),
                ty_args=rx.AnyType(),
            ),
            _name=name,
        )


def begin(cache: PagedKVCache, hidden: Tensor) -> Tensor:
    """Tell the attention kernels of this pass where the pages are.

    Parameters
    ----------
    cache : PagedKVCache
        The function's cache.
    hidden : Tensor
        Any float16 [tokens, features]; it only has the right shape.

    Returns
    -------
    Tensor
        The `token` argument of the kernels, [tokens, features - 2, 1].
    """
    tokens, features = hidden.shape
    builder = rx.BlockBuilder.current()
    view = builder.emit(rx.op.reshape(hidden._expr, (tokens, features, 1)))
    out = rx.call_dps_packed(
        "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
        [cache._expr, rx.prim_value(0), rx.prim_value(1.0), view],
        out_ty=rx.TensorType((tokens, features - 2, 1), "float16"),
    )
    return Tensor(_expr=builder.emit(out))


def _arguments(config: AttentionConfig, token_size: int, capacity: tuple, store: rx.Expr) -> list:
    """Arguments of the runtime's constructor, in its order."""
    builder = rx.BlockBuilder.current()

    def add(name: str, function: tirx.PrimFunc) -> Any:
        return builder.add_func(function, f"kv_cache_{name}")

    def backend(name: str, function: tirx.PrimFunc) -> rx.Expr:
        return rx.Tuple([tvm.ir.StringImm("tirx"), add(name, function)])

    none = rx.Tuple([])
    return [
        rx.ShapeExpr([*capacity, PAGE_TOKENS, 0, 1]),
        rx.ShapeExpr([0, 1]),
        rx.prim_value(token_size - 2),
        rx.prim_value(1),
        rx.prim_value(1),
        rx.prim_value(1),
        rx.ShapeExpr([int(AttnKind.MHA)]),
        rx.prim_value(False),  # no disaggregation
        rx.prim_value(int(RopeMode.NORMAL)),  # the mode that hands on a tensor
        rx.prim_value(1),
        rx.prim_value(10000.0),
        store,
        rx.op.zeros((), "float16"),
        add("slots", slots()),
        rx.prim_value(0),  # no MLA append
        backend("nothing_ragged", nothing(9, _causal())),
        backend("list_prefill", page_list(prefill=True)),
        backend("list_decode", page_list(prefill=False)),
        none,  # windows are the kernels' own business
        none,
        none,  # no token trees
        none,
        none,  # no MLA prefill
        rx.Tuple([add("nothing_merge", nothing(4, ()))]),
        add("begin", first()),
        add("copy_page", copy_page(config)),
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


def _tell(function: str, *args) -> None:
    """Run a text function on one thread of the device."""
    with T.frame_scope(
        [T.thread_binding(1, thread="blockIdx.x"), T.thread_binding(1, thread="threadIdx.x")]
    ):
        with T.sblock("tell"):
            T.reads()
            T.writes()
            call(function, *args, text=STATE)


def first() -> tirx.PrimFunc:
    """Build the callback in the rotation's place: notes pages and positions, and starts afresh."""

    def body() -> None:
        handles = _handles("qkv", "positions", "q", "k", "v", "pages")
        n, pages, elements = T.int32(), T.int64(), T.int64()
        positions = _indices(handles[1], n)
        store = T.match_buffer(handles[5], (pages, elements), "float16")
        zero = tirx.const(0, "int32")
        _tell("amx_state_begin", at(store, zero, zero), at(positions, zero))

    return _callback("kv_cache_begin", body)


def slots() -> tirx.PrimFunc:
    """Build the callback in append's place: notes the slots of several new tokens."""

    def body() -> None:
        handles = _handles("own_pages", "k", "v", "slots")
        n = T.int32()
        found = _indices(handles[3], n)
        with T.If(n > 1):  # one token's slot follows from the lists
            with T.Then():
                _tell("amx_state_slots", at(found, tirx.const(0, "int32")))

    return _callback("kv_cache_slots", body)


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
        _tell("amx_state_list", at(starts, zero), at(pages, zero), rows, n - 1)

    return _callback("kv_cache_list", body)


def copy_page(config: AttentionConfig) -> tirx.PrimFunc:
    """Build the copy of a page, of all layers, for a fork: own pages, source, target, length."""
    words = config.page_elements // 8

    def body() -> None:
        _handles("own_pages")
        source, target = T.arg("source", T.int64()), T.arg("target", T.int64())
        T.arg("length", T.int64())
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
                call("amx_copy_page", size, source, target, index, text=STATE)

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
