# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Kernels of the cache as TensorIR functions; the CUDA text of their blocks is in the files beside.

    setup     pages, recent, told, work -> state
    begin     token, state, told -> token; begins a pass: rounds what leaves the newest, and divides
              a step of many sequences
    batch     qkv [m, heads + 2 kv, d], token, state -> out [m, heads, d]; one new token a sequence
    store     qkv, token, state -> q [m, heads, d], k and v [m, kv, d]; and rounds what is not newest
    prefill   q, k, v, token, state -> out [m, heads, d]; new tokens of any sequences

The other arguments are those of ``attention/kernels.py``.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from amx_tvm.targets.cuda.gpus import gpu
from relax_passes.attention_spec import AttentionSpec
from relax_passes.kernels.cuda.attention.config import TOKEN, frequencies
from relax_passes.kernels.cuda.attention.division import FEW
from relax_passes.kernels.cuda.attention.kernels import (
    PLAN,
    argument,
    function,
    kernel_of,
    log2_scale,
    orders,
    shared_memory,
)
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, at

from . import encode, prefill_text
from .items import WARPS, Items
from .layout import FIELDS, Layout
from .state_text import SETUP, STATE_WORDS

_ZERO = tirx.const(0, "int32")


def _state() -> tirx.Expr:
    return at(T.arg("state", T.Buffer((STATE_WORDS,), "int32")), 0)


def _sinks(spec: AttentionSpec) -> list:
    return [at(argument("sinks", spec.heads), 0)] if spec.sinks else []


def _first(buffer: tirx.Buffer) -> tirx.Expr:
    return at(buffer, *(_ZERO for _ in buffer.shape))


def _threads(*extents: tuple[Any, str]) -> list:
    return [T.thread_binding(extent, thread=name) for extent, name in extents]


def setup(layout: Layout) -> tirx.PrimFunc:
    """Build the kernel that notes where the tensors of a cache are."""

    def body() -> None:
        pages, places, told, work = (
            tirx.Var(n, "int64") for n in ("pages", "places", "told", "work")
        )
        sizes = layout
        tensors = [
            T.arg("pages", T.Buffer((pages, sizes.page_bytes), "uint8")),
            T.arg("recent", T.Buffer((places, sizes.sequence_bytes // 2), "float16")),
            T.arg("told", T.Buffer((told,), "int32")),
            T.arg("work", T.Buffer((work,), "int32")),
        ]
        state = _state()
        with T.frame_scope(_threads((1, "blockIdx.x"), (1, "threadIdx.x"))):
            with T.sblock("setup"):
                T.reads()
                T.writes()
                SETUP(state, *(_first(tensor) for tensor in tensors))

    return function("packed_setup", body)


def begin(items: Items) -> tirx.PrimFunc:
    """Build the kernels that begin a pass: token, state, token [m, 1, TOKEN]."""
    layout, divide = items.layout, items.plan()
    heads = layout.layers * layout.kv_heads

    def body() -> None:
        rows = tirx.Var("m", "int64")
        orders(rows)
        state = _state()
        T.arg("told", T.Buffer((tirx.Var("n", "int64"),), "int32"))
        argument("planned", rows, 1, TOKEN)
        blocks = _threads(
            (rows, "blockIdx.x"),
            (-(-heads // encode.WARPS), "blockIdx.y"),
            (encode.WARPS, "threadIdx.y"),
            (32, "threadIdx.x"),
        )
        with T.frame_scope(blocks) as (row, block, warp, lane):
            with T.sblock("leave"):
                T.reads()
                T.writes()
                encode.leave(layout, state, tirx.Cast("int32", row), block, warp, lane)
        with T.frame_scope(_threads((1, "blockIdx.x"), (256, "threadIdx.x"))) as (_, tid):
            with T.sblock("plan"):
                T.reads()
                T.writes()
                divide(state, tirx.Cast("int32", rows), tid)

    return function(PLAN, body)


def batch(spec: AttentionSpec, items: Items) -> tirx.PrimFunc:
    """Build decode attention of any number of sequences, behind `begin`."""
    rows = tirx.Var("m", "int64")
    d = spec.head_dim

    def kernel(warps: int, given: list) -> None:
        attend = items.attend(spec, warps)
        threads = _threads(
            (rows + items.extra(warps), "blockIdx.y"),
            (items.heads.blocks, "blockIdx.x"),
            (warps, "threadIdx.y"),
            (32, "threadIdx.x"),
        )

        def one(shared: Any, number: Any, head: Any, warp: Any, lane: Any) -> None:
            with T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", items.resident(warps)):
                attend(shared, *given, tirx.Cast("int32", number), head, warp, lane)

        kernel_of(threads, items.shared_floats(spec, warps), one)

    def body() -> None:
        qkv = argument("qkv", rows, spec.heads + 2 * spec.kv_heads, d)
        orders(rows)
        state, sinks = _state(), _sinks(spec)
        layer = tirx.Cast("int32", T.arg("layer", T.int64()))
        out = argument("out", rows, spec.heads, d)
        scales = (tirx.const(log2_scale(spec), "float32"), tirx.const(spec.soft_cap, "float32"))
        given = [_first(qkv), state, *sinks, _first(out), layer, *scales]
        with T.If(rows <= FEW):
            with T.Then():
                kernel(items.few_warps, given)
            with T.Else():
                kernel(WARPS, given)

    return function("attention_packed", body, items.gpu.clusters)


def store(spec: AttentionSpec, layout: Layout) -> tirx.PrimFunc:
    """Build the kernels that rotate and turn a chunk, and round what is not among the newest."""
    d, rotation, turns = spec.head_dim, spec.rotation, frequencies(spec.rotation)
    warps = min(8, spec.heads + 2 * spec.kv_heads)
    put = Intrinsic(
        f"amx_packed_store_{turns.name}_{d}_{spec.heads}_{spec.kv_heads}_{layout.turn}",
        f"""
  __shared__ float2 turn[{max(rotation.pairs, 1)}];
  amx_packed_store<{d}, {spec.heads}, {spec.kv_heads}, {rotation.pairs}, {layout.turn}>(
      turn, (const half*)qkv, (const AmxPacked*)state, (half*)q, (half*)k, (half*)v, {turns.name}, {rotation.factor!r}f, row, {warps}, warp, lane);""",
        (prefill_text.STORE, turns),
        "void(const void* qkv, const void* state, void* q, void* k, void* v, int row, int warp, int lane)",
    )

    def body() -> None:
        rows = tirx.Var("m", "int64")
        qkv = argument("qkv", rows, spec.heads + 2 * spec.kv_heads, d)
        orders(rows)
        state = _state()
        layer = tirx.Cast("int32", T.arg("layer", T.int64()))
        q = argument("q", rows, spec.heads, d)
        k, v = (_first(argument(name, rows, spec.kv_heads, d)) for name in "kv")
        blocks = _threads((rows, "blockIdx.x"), (warps, "threadIdx.y"), (32, "threadIdx.x"))
        with T.frame_scope(blocks) as (row, warp, lane):
            with T.sblock("store"):
                T.reads()
                T.writes()
                put(_first(qkv), state, _first(q), k, v, tirx.Cast("int32", row), warp, lane)
        pieces = spec.kv_heads * 2 * (d // 8)
        blocks = _threads(((rows * pieces + 127) // 128, "blockIdx.x"), (128, "threadIdx.x"))
        with T.frame_scope(blocks) as (block, tid):
            with T.sblock("round"):
                T.reads()
                T.writes()
                item = tirx.Cast("int32", block) * 128 + tid
                encode.round_rows(layout, state, k, v, layer, tirx.Cast("int32", rows), item)

    return function("attention_store", body)


def prefill(spec: AttentionSpec, layout: Layout, arch: str) -> tirx.PrimFunc:
    """Build attention of chunks over all that their sequences hold, which then keeps the newest."""
    d, limit = spec.head_dim, gpu(arch).shared_bytes
    tokens = next(n for n in (64, 32, 16) if prefill_text.shared_floats(d, n) * 4 + 64 <= limit)
    where = f"{layout.spec.newest}, {layout.spec.first}"
    attend = prefill_text.ATTEND[
        layout.kind, d, layout.spec.newest, layout.spec.first, layout.turn, layout.layers,
        spec.kv_heads, spec.group, tokens,
    ]  # fmt: skip
    remember = Intrinsic(
        f"amx_remember_{layout.name}_{layout.layers}_{spec.kv_heads}",
        f"""  amx_packed_remember<{d}, {where}, {layout.place}>(
      (const AmxPacked*)state, (const half*)k, (const half*)v, layer, row, rows, kv, tid, 64);""",
        (prefill_text.REMEMBER,),
        "void(const void* state, const void* k, const void* v, int layer, int row, int rows, int kv, int tid)",
    )

    def body() -> None:
        rows = tirx.Var("m", "int64")
        q = argument("q", rows, spec.heads, d)
        k, v = (_first(argument(name, rows, spec.kv_heads, d)) for name in "kv")
        orders(rows)
        state = _state()
        sinks = _sinks(spec) or [tirx.reinterpret("handle", tirx.const(0, "uint64"))]
        layer = tirx.Cast("int32", T.arg("layer", T.int64()))
        out = argument("out", rows, spec.heads, d)
        count = tirx.Cast("int32", rows)
        blocks = (count + 63) // 64
        threads = _threads(
            (blocks, "blockIdx.y"),
            (spec.heads, "blockIdx.x"),
            (4, "threadIdx.y"),
            (32, "threadIdx.x"),
        )
        with T.frame_scope(threads) as (block, head, warp, lane):
            with T.sblock("attention"):
                T.reads()
                T.writes()
                shared = at(shared_memory(prefill_text.shared_floats(d, tokens)), _ZERO)
                scales = (
                    tirx.const(log2_scale(spec), "float32"),
                    tirx.const(spec.soft_cap, "float32"),
                )
                given = (shared, _first(q), k, v, state, *sinks, _first(out), layer, *scales)
                attend(*given, tirx.const(spec.window, "int32"), block, blocks, head, warp, lane)
        threads = _threads(
            (count, "blockIdx.x"), (spec.kv_heads, "blockIdx.y"), (64, "threadIdx.x")
        )
        with T.frame_scope(threads) as (row, kv, tid):
            with T.sblock("remember"):
                T.reads()
                T.writes()
                remember(state, k, v, layer, row, count, kv, tid)

    return function("attention_prefill", body)


__all__ = ["FIELDS", "PLAN", "batch", "begin", "prefill", "setup", "store"]
