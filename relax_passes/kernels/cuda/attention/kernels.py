# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Attention kernels as TensorIR functions; the CUDA text of their blocks is in the files beside.

    decode    qkv [1, heads + 2 kv, d], token, state -> out [1, heads, d]; one sequence's new token
    plan      token, state -> token; begins a step of many sequences
    batch     qkv [m, heads + 2 kv, d], token, state -> out [m, heads, d]; one new token a sequence
    store     qkv, token, state -> q [m, heads, d]; keys and values go to the pages
    prefill   q, token, state -> out [m, heads, d]; new tokens of any sequences

Between `state` and the layer stand the sinks float16 [heads] where a layer has them, then the weights
float16 [d] of the norms of heads where it has those (`store`: these alone, `prefill`: the sinks
alone), and q has the channels that pages have. The number of the layer, an int64, comes before the
result, so that layers share functions. `token`
[m, 1, 4] is the result of the call that told the kernels where the pages are (`cache`); nothing
reads it, but it orders the kernels behind that call. `state` is where that call's callbacks noted
it (`state_text`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from amx_tvm.targets.cuda.gpus import gpu
from relax_passes.attention_spec import AttentionSpec
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, at

from . import batch_text, decode_text, prefill_text
from .batch_text import Batches
from .config import (
    EXTRAS,
    NORMS,
    TOKEN,
    Heads,
    declared,
    extras,
    frequencies,
    passed,
    stored_channels,
)
from .division import FEW
from .state_text import STATE_WORDS

_DEPENDENT = "tirx.use_programtic_dependent_launch"  # TVM 0.27's own spelling
PLAN = "attention_plan"  # the name of its function in a module
_WARPS = 8
_LOG2E = 1.4426950408889634


def function(name: str, body: Callable[[], None], dependent: bool = False) -> tirx.PrimFunc:
    """Build a scheduled function; ``body`` makes its arguments and kernels."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            attrs: dict = {"tirx.noalias": True, "tirx.is_scheduled": True}
            if dependent:
                attrs["tirx.kernel_launch_params"] = [_DEPENDENT]
            T.func_attr(attrs)
            body()
    return builder.get().without_attr("global_symbol")  # the module names it


def _rows():  # noqa: ANN202 - the extent, and the same as int32
    rows = tirx.Var("m", "int64")
    return rows, tirx.Cast("int32", rows)


def argument(name: str, *shape) -> tirx.Buffer:
    """Add a float16 argument of a shape."""
    return T.arg(name, T.Buffer(shape, "float16"))


def orders(extent) -> None:  # noqa: ANN001
    """Add the argument `token`."""
    argument("token", extent, 1, TOKEN)


def _state() -> tirx.Expr:
    return at(T.arg("state", T.Buffer((STATE_WORDS,), "int32")), 0)


def _extras(spec: AttentionSpec, names: tuple[str, ...] = EXTRAS) -> list:
    """Return the addresses of what a layer has of `extras`, of some names only."""
    sizes = {"sinks": spec.heads}
    found = [name for name in extras(spec) if name in names]
    return [at(argument(name, sizes.get(name, spec.head_dim)), 0) for name in found]


def shared_memory(floats: int) -> tirx.Buffer:
    """Dynamic shared memory; a store to a last element, used by nobody, keeps its size."""
    shared = T.sblock_alloc_buffer((floats + 1,), "float32", scope="shared.dyn")
    T.buffer_store(shared, tirx.const(0.0, "float32"), [floats])
    return shared


def log2_scale(spec: AttentionSpec) -> float:
    """Return the factor on scores: in powers of two, unless they are bounded first."""
    return spec.scale if spec.soft_cap else spec.scale * _LOG2E


def _attention(
    name: str,
    spec: AttentionSpec,
    extent: Any,
    emit: Callable[..., None],
    dependent: bool,
) -> tirx.PrimFunc:
    """Build a function of the arguments of `decode`; ``emit`` gets them and makes its kernels."""
    d = spec.head_dim

    def body() -> None:
        qkv = argument("qkv", extent, spec.heads + 2 * spec.kv_heads, d)
        orders(extent)
        state, more = _state(), _extras(spec)
        layer = tirx.Cast("int32", T.arg("layer", T.int64()))
        out = argument("out", extent, spec.heads, d)
        zero = tirx.const(0, "int32")
        places = (at(qkv, zero, zero, zero), state, *more, at(out, zero, zero, zero))
        scales = (tirx.const(log2_scale(spec), "float32"), tirx.const(spec.soft_cap, "float32"))
        emit(*places, layer, *scales)

    return function(name, body, dependent)


def kernel_of(threads: list, floats: int, emit: Callable[..., None]) -> None:
    """Emit one kernel; ``emit`` gets the address of its shared memory, and its threads."""
    with T.frame_scope(threads) as bound:
        with T.sblock("attention"):
            T.reads()
            T.writes()
            emit(at(shared_memory(floats), tirx.const(0, "int32")), *bound)


def decode(spec: AttentionSpec, layers: int, arch: str) -> tirx.PrimFunc:
    """Build decode attention of one sequence.

    Parameters
    ----------
    spec : AttentionSpec
        What is computed; the number of the layer is an argument of the kernel.
    layers : int
        Of the model.
    arch : str
        Architecture, such as "sm_90a".
    """
    rotation, facts, heads = spec.rotation, gpu(arch), Heads(spec)
    # a cluster for each kv head: about as many blocks as multiprocessors
    splits = (8 if heads.blocks <= 16 else 4) if facts.clusters else 1
    dependent = "true" if facts.clusters else "false"
    numbers = f"{heads.numbers}, {splits}, {_WARPS}, {rotation.pairs}, {dependent}"
    # A function around it passes the frequencies, which the IR cannot name.
    turns, more = frequencies(rotation), extras(spec)
    attend = Intrinsic(
        "_".join([f"amx_decode_{turns.name}_{heads.name}_{splits}_{spec.window}", *more]),
        f"""  amx_attend_decode<{numbers}>(shared, qkv, state, out, {passed(spec, EXTRAS)}, {spec.norm_eps!r}f, {turns.name},
                               {rotation.factor!r}f, layer, {layers}, scale, cap, {spec.window}, split, head, warp, lane);""",
        (decode_text.DECODE, turns),
        f"void(float* shared, const void* qkv, const void* state, {declared(more)}void* out, int layer, float scale, "
        "float cap, int head, int split, int warp, int lane)",
    )
    floats = decode_text.shared_floats(heads.stored, heads.group, rotation.pairs, _WARPS)

    def emit(*given: Any) -> None:
        threads = [
            T.thread_binding(heads.blocks, thread="blockIdx.y"),
            T.thread_binding(splits, thread="blockIdx.x"),
            T.thread_binding(_WARPS, thread="threadIdx.y"),
            T.thread_binding(32, thread="threadIdx.x"),
        ]
        if splits > 1:
            threads.insert(2, T.thread_binding(splits, thread="clusterCtaIdx.x"))

        def one(shared: Any, head: Any, split: Any, *rest: Any) -> None:
            attend(shared, *given, head, split, *rest[-2:])

        kernel_of(threads, floats, one)

    return _attention("attention_decode", spec, 1, emit, facts.clusters)


def plan(batches: Batches) -> tirx.PrimFunc:
    """Build the kernel that begins a step of many sequences: token, state, token [m, 1, TOKEN]."""
    begin = batches.plan()

    def body() -> None:
        rows = tirx.Var("m", "int64")
        orders(rows)
        state = _state()
        argument("planned", rows, 1, TOKEN)
        threads = [
            T.thread_binding(rows + 1, thread="blockIdx.x"),
            T.thread_binding(256, thread="threadIdx.x"),
        ]
        with T.frame_scope(threads) as (block, tid):
            with T.sblock("plan"):
                T.reads()
                T.writes()
                begin(state, tirx.Cast("int32", rows), tirx.Cast("int32", block), tid)

    return function(PLAN, body)


def batch(spec: AttentionSpec, layers: int, batches: Batches) -> tirx.PrimFunc:
    """Build decode attention of any number of sequences, behind `plan`; see `decode`."""
    rows = tirx.Var("m", "int64")

    def kernel(warps: int, *given: Any) -> None:
        attend = batches.attend(spec, layers, warps)
        threads = [
            T.thread_binding(rows + batches.extra(warps), thread="blockIdx.y"),
            T.thread_binding(batches.heads.blocks, thread="blockIdx.x"),
            T.thread_binding(warps, thread="threadIdx.y"),
            T.thread_binding(32, thread="threadIdx.x"),
        ]

        def one(shared: Any, number: Any, head: Any, warp: Any, lane: Any) -> None:
            with T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", batches.resident(warps)):
                attend(shared, *given, tirx.Cast("int32", number), head, warp, lane)

        kernel_of(threads, batch_text.shared_floats(spec, warps), one)

    def emit(*given: Any) -> None:
        with T.If(rows <= FEW):
            with T.Then():
                kernel(batch_text.FEW_WARPS, *given)
            with T.Else():
                kernel(batch_text.WARPS, *given)

    return _attention("attention_batch", spec, rows, emit, batches.gpu.clusters)


def store(spec: AttentionSpec, layers: int) -> tirx.PrimFunc:
    """Build the kernel that rotates a chunk and stores its keys and values; see `decode`."""
    d, stored, rotation = spec.head_dim, stored_channels(spec.head_dim), spec.rotation
    turns, norms = frequencies(rotation), NORMS * bool(spec.norm_eps)
    name = "_".join([f"amx_store_{turns.name}_{d}_{spec.heads}_{spec.kv_heads}", *norms])
    numbers = f"{stored}, {d}, {spec.heads}, {spec.kv_heads}, {rotation.pairs}"
    put = Intrinsic(
        name,
        f"""  amx_attend_store<{numbers}, {"true" if norms else "false"}>(
      qkv, state, {passed(spec, NORMS)}, {spec.norm_eps!r}f, q, {turns.name}, {rotation.factor!r}f, layer, {layers}, m, block,
      head, tid);""",
        (prefill_text.PREFILL, turns),
        f"void(const void* qkv, const void* state, {declared(norms)}void* q, int layer, int m, int block, int head, int tid)",
    )

    def body() -> None:
        extent, rows = _rows()
        qkv = argument("qkv", extent, spec.heads + 2 * spec.kv_heads, d)
        orders(extent)
        state, weights = _state(), _extras(spec, NORMS)
        layer = tirx.Cast("int32", T.arg("layer", T.int64()))
        q = argument("q", extent, spec.heads, stored)
        threads = [
            T.thread_binding(spec.heads + 2 * spec.kv_heads, thread="blockIdx.y"),
            T.thread_binding((rows + 15) // 16, thread="blockIdx.x"),
            T.thread_binding(128, thread="threadIdx.x"),
        ]
        with T.frame_scope(threads) as (head, block, tid):
            with T.sblock("store"):
                T.reads()
                T.writes()
                zero = tirx.const(0, "int32")
                place = (layer, rows, block, head, tid)
                given = (at(qkv, zero, zero, zero), state, *weights, at(q, zero, zero, zero))
                put(*given, *place)

    return function("attention_store", body)


def prefill(spec: AttentionSpec, layers: int, arch: str) -> tirx.PrimFunc:
    """Build attention of chunks over all pages of their sequences; see `decode`."""
    d = stored_channels(spec.head_dim)
    limit = gpu(arch).shared_bytes
    tokens = next(n for n in (64, 32, 16) if prefill_text.shared_floats(d, n) * 4 + 64 <= limit)
    attend = prefill_text.ATTEND[d, spec.head_dim, spec.group, spec.kv_heads, tokens]

    def body() -> None:
        extent, rows = _rows()
        q = argument("q", extent, spec.heads, d)
        orders(extent)
        state = _state()
        none = [tirx.reinterpret("handle", tirx.const(0, "uint64"))]
        sinks = _extras(spec, ("sinks",)) or none
        layer = tirx.Cast("int32", T.arg("layer", T.int64()))
        out = argument("out", extent, spec.heads, spec.head_dim)
        blocks = (rows + 63) // 64
        threads = [
            T.thread_binding(blocks, thread="blockIdx.y"),
            T.thread_binding(spec.heads, thread="blockIdx.x"),
            T.thread_binding(4, thread="threadIdx.y"),
            T.thread_binding(32, thread="threadIdx.x"),
        ]
        with T.frame_scope(threads) as (block, head, warp, lane):
            with T.sblock("attention"):
                T.reads()
                T.writes()
                zero = tirx.const(0, "int32")
                attend(
                    at(shared_memory(prefill_text.shared_floats(d, tokens)), zero),
                    at(q, zero, zero, zero),
                    state,
                    *sinks,
                    at(out, zero, zero, zero),
                    layer,
                    tirx.const(layers, "int32"),
                    tirx.const(log2_scale(spec), "float32"),
                    tirx.const(spec.soft_cap, "float32"),
                    tirx.const(spec.window, "int32"),
                    block,
                    blocks,
                    head,
                    warp,
                    lane,
                )

    return function("attention_prefill", body)
