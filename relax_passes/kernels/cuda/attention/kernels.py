# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Attention kernels as TensorIR functions; the CUDA text of their blocks is in the files beside.

    decode    qkv [m, heads + 2 kv, d], token, state -> out [m, heads, d]; one new token a sequence
    store     qkv, token, state -> q [m, heads, d]; keys and values go to the pages
    prefill   q, token, state -> out [m, heads, d]; new tokens of any sequences

The number of the layer, an int64, comes before the result, so that layers share functions. `token`
[m, 1, 4] is the result of the call that told the kernels where the pages are (`cache`); nothing
reads it, but it orders the kernels behind that call. `state` is where that call's callbacks noted
it (`state_text`).
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from amx_tvm.targets.cuda.gpus import gpu
from relax_passes.attention_spec import AttentionSpec
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, at

from . import decode_text, prefill_text
from .config import TOKEN, frequencies
from .state_text import STATE_WORDS

_DEPENDENT = "tirx.use_programtic_dependent_launch"  # TVM 0.27's own spelling
_WARPS = 8
_LOG2E = 1.4426950408889634


def _function(name: str, body: Callable[[], None], dependent: bool = False) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            attrs: dict = {"tirx.noalias": True, "tirx.is_scheduled": True}
            if dependent:
                attrs["tirx.kernel_launch_params"] = [_DEPENDENT]
            T.func_attr(attrs)
            body()
    return builder.get().without_attr("global_symbol")  # the module names it


def _rows(m: int | None):  # noqa: ANN202 - the extent, and the same as int32
    if m is not None:
        return m, tirx.const(m, "int32")
    rows = tirx.Var("m", "int64")
    return rows, tirx.Cast("int32", rows)


def _argument(name: str, *shape) -> tirx.Buffer:
    return T.arg(name, T.Buffer(shape, "float16"))


def _orders(extent) -> None:  # noqa: ANN001
    _argument("token", extent, 1, TOKEN)


def _state() -> tirx.Expr:
    return at(T.arg("state", T.Buffer((STATE_WORDS,), "int32")), 0)


def _shared(floats: int) -> tirx.Buffer:
    """Dynamic shared memory; a store to a last element, used by nobody, keeps its size."""
    shared = T.sblock_alloc_buffer((floats + 1,), "float32", scope="shared.dyn")
    T.buffer_store(shared, tirx.const(0.0, "float32"), [floats])
    return shared


def _scale(spec: AttentionSpec) -> float:
    return spec.scale if spec.soft_cap else spec.scale * _LOG2E


def decode(spec: AttentionSpec, layers: int, arch: str, m: int | None) -> tirx.PrimFunc:
    """Build decode attention.

    Parameters
    ----------
    spec : AttentionSpec
        What is computed; the number of the layer is an argument of the kernel.
    layers : int
        Of the model.
    arch : str
        Architecture, such as "sm_90a".
    m : int or None
        Sequences; None compiles for any number, 1 spares dependent loads.
    """
    rotation = spec.rotation
    facts = gpu(arch)
    # a cluster for each kv head and sequence: about as many blocks as multiprocessors
    splits = (8 if spec.kv_heads <= 16 else 4) if facts.clusters else 1
    d, group = spec.head_dim, spec.group
    one, dependent = m == 1, facts.clusters
    flags = ", ".join("true" if f else "false" for f in (one, dependent))
    numbers = f"{d}, {group}, {spec.kv_heads}, {splits}, {_WARPS}, {rotation.pairs}, {flags}"
    # A function around it passes the frequencies, which the IR cannot name.
    turns = frequencies(rotation)
    name = f"amx_decode_{turns.name}_{d}_{group}_{spec.kv_heads}_{splits}_{int(one)}"
    attend = Intrinsic(
        name,
        f"""  amx_attend_decode<{numbers}>(shared, qkv, state, out, {turns.name}, {rotation.factor!r}f, layer, {layers},
                               scale, cap, window, split, head, row, warp, lane);""",
        (decode_text.DECODE, turns),
        "void(float* shared, const void* qkv, const void* state, void* out, int layer, float scale, "
        "float cap, int window, int split, int head, int row, int warp, int lane)",
    )
    floats = decode_text.shared_floats(d, group, rotation.pairs, _WARPS)

    def body() -> None:
        extent, rows = _rows(m)
        qkv = _argument("qkv", extent, spec.heads + 2 * spec.kv_heads, d)
        _orders(extent)
        state = _state()
        layer = tirx.Cast("int32", T.arg("layer", T.int64()))
        out = _argument("out", extent, spec.heads, d)
        threads = [
            T.thread_binding(rows, thread="blockIdx.z"),
            T.thread_binding(spec.kv_heads, thread="blockIdx.y"),
            T.thread_binding(splits, thread="blockIdx.x"),
            T.thread_binding(_WARPS, thread="threadIdx.y"),
            T.thread_binding(32, thread="threadIdx.x"),
        ]
        if splits > 1:
            threads.insert(3, T.thread_binding(splits, thread="clusterCtaIdx.x"))
        with T.frame_scope(threads) as bound:
            with T.sblock("attention"):
                T.reads()
                T.writes()
                zero = tirx.const(0, "int32")
                attend(
                    at(_shared(floats), zero),
                    at(qkv, zero, zero, zero),
                    state,
                    at(out, zero, zero, zero),
                    layer,
                    tirx.const(_scale(spec), "float32"),
                    tirx.const(spec.soft_cap, "float32"),
                    tirx.const(spec.window, "int32"),
                    bound[2],
                    bound[1],
                    bound[0],
                    bound[-2],
                    bound[-1],
                )

    return _function("attention_decode", body, dependent)


def store(spec: AttentionSpec, layers: int) -> tirx.PrimFunc:
    """Build the kernel that rotates a chunk and stores its keys and values; see `decode`."""
    d, rotation = spec.head_dim, spec.rotation
    turns = frequencies(rotation)
    name = f"amx_store_{turns.name}_{d}_{spec.heads}_{spec.kv_heads}"
    put = Intrinsic(
        name,
        f"""  amx_attend_store<{d}, {spec.heads}, {spec.kv_heads}, {rotation.pairs}>(
      qkv, state, q, {turns.name}, {rotation.factor!r}f, layer, {layers}, m, block, head, tid);""",
        (prefill_text.PREFILL, turns),
        "void(const void* qkv, const void* state, void* q, int layer, int m, int block, int head, int tid)",
    )

    def body() -> None:
        extent, rows = _rows(None)
        qkv = _argument("qkv", extent, spec.heads + 2 * spec.kv_heads, d)
        _orders(extent)
        state = _state()
        layer = tirx.Cast("int32", T.arg("layer", T.int64()))
        q = _argument("q", extent, spec.heads, d)
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
                given = (at(qkv, zero, zero, zero), state, at(q, zero, zero, zero))
                put(*given, *place)

    return _function("attention_store", body)


def prefill(spec: AttentionSpec, layers: int, arch: str) -> tirx.PrimFunc:
    """Build attention of chunks over all pages of their sequences; see `decode`."""
    d = spec.head_dim
    limit = gpu(arch).shared_bytes
    tokens = next(n for n in (64, 32, 16) if prefill_text.shared_floats(d, n) * 4 + 64 <= limit)
    attend = prefill_text.ATTEND[d, spec.group, spec.kv_heads, tokens]

    def body() -> None:
        extent, rows = _rows(None)
        q = _argument("q", extent, spec.heads, d)
        _orders(extent)
        state = _state()
        layer = tirx.Cast("int32", T.arg("layer", T.int64()))
        out = _argument("out", extent, spec.heads, d)
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
                    at(_shared(prefill_text.shared_floats(d, tokens)), zero),
                    at(q, zero, zero, zero),
                    state,
                    at(out, zero, zero, zero),
                    layer,
                    tirx.const(layers, "int32"),
                    tirx.const(_scale(spec), "float32"),
                    tirx.const(spec.soft_cap, "float32"),
                    tirx.const(spec.window, "int32"),
                    block,
                    blocks,
                    head,
                    warp,
                    lane,
                )

    return _function("attention_prefill", body)
