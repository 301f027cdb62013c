"""The most likely token on the GPU: 4 bytes a row to the host instead of the logits.

    best    logits float32 [m, vocab] -> int64 [m, blocks]: the largest of every block's share
    choose  int64 [m, blocks] -> tokens int32 [most], of which m are written; -1 where logits hold
            NaN or infinity
    ids     given int32 [m], previous int32 [most] -> int32 [m]: what is given, or where that is
            -1 - i, token i of the step before

Keys order as the logits do and, of equals, put the lower token first: the value's bits, made
monotonic, above the token's complement. NaN is above everything.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .block import over_block
from .intrinsics.base import hold, local

_THREADS = 256

_NAN = tirx.const(0xFFFFFFFF, "uint32")
_INFINITY = tirx.const(0xFF800000, "uint32")  # order of infinity


OPAQUE = 8  # pattern: fused with nothing, whatever TVM sees of the stores


def blocks_of(m: int | None) -> int:
    """Return how many blocks share a row: of a single row's logits, half a thousand each."""
    return 128 if m == 1 else 16


def _kernel(name: str, body: Callable) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            attrs = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": OPAQUE}
            T.func_attr(attrs)
            body()
    return builder.get().without_attr("global_symbol")


def _launch(blocks: int, rows: tirx.Expr | int, emit: Callable) -> None:
    """Emit a grid of blocks a row; ``emit`` gets row, block and thread."""
    threads = [
        T.thread_binding(rows, thread="blockIdx.y"),
        T.thread_binding(blocks, thread="blockIdx.x"),
        T.thread_binding(_THREADS, thread="threadIdx.x"),
    ]
    with T.frame_scope(threads) as (row, block, tid):
        with T.sblock("argmax"):
            T.reads()
            T.writes()
            emit(row, block, tid)


def _rows(m: int | None) -> tirx.Expr | int:
    return tirx.Var("m", "int64") if m is None else m


def _largest(key: tirx.Expr, tid: tirx.Expr) -> tirx.Expr:
    return over_block(key, _THREADS // 32, tid, tirx.max)


def _key(logit: tirx.Expr, token: tirx.Expr) -> tirx.Expr:
    """Order of a logit, above the complement of its token."""
    bits = hold(tirx.reinterpret("uint32", logit))
    sign = tirx.const(0x80000000, "uint32")
    nan = (bits & tirx.const(0x7FFFFFFF, "uint32")) > tirx.const(0x7F800000, "uint32")
    order = tirx.Select((bits & sign) != 0, tirx.bitwise_not(bits), bits | sign)
    order = hold(tirx.Select(nan, _NAN, order))
    low = _NAN - tirx.Cast("uint32", token)
    upper = tirx.shift_left(tirx.Cast("uint64", order), tirx.const(32, "uint64"))
    return tirx.bitwise_or(upper, tirx.Cast("uint64", low))


def best(vocab: int, m: int | None) -> tirx.PrimFunc:
    """Build the first kernel, of one row or any number."""
    blocks = blocks_of(m)

    def body() -> None:
        rows = _rows(m)
        logits = T.arg("logits", T.Buffer((rows, vocab), "float32"))
        out = T.arg("best", T.Buffer((rows, blocks), "int64"))

        def emit(row, block, tid) -> None:  # noqa: ANN001
            key = local(1, "uint64")
            T.buffer_store(key, tirx.const(0, "uint64"), [0])
            step = _THREADS * blocks
            with T.serial(-(-vocab // step)) as i:
                token = i * step + block * _THREADS + tid
                with T.If(token < vocab):
                    with T.Then():
                        mine = hold(_key(logits[row, token], token))
                        T.buffer_store(key, tirx.max(key[0], mine), [0])
            found = _largest(key[0], tid)
            with T.If(tirx.EQ(tid, 0)):
                with T.Then():
                    T.buffer_store(out, tirx.reinterpret("int64", found), [row, block])

        _launch(blocks, rows, emit)

    return _kernel("argmax_best", body)


def choose(m: int | None, most: int) -> tirx.PrimFunc:
    """Build the second kernel."""
    blocks = blocks_of(m)

    def body() -> None:
        rows = _rows(m)
        found = T.arg("best", T.Buffer((rows, blocks), "int64"))
        tokens = T.arg("tokens", T.Buffer((most,), "int32"))

        def emit(row, _block, tid) -> None:  # noqa: ANN001
            key = local(1, "uint64")
            T.buffer_store(key, tirx.const(0, "uint64"), [0])
            with T.If(tid < blocks):
                with T.Then():
                    T.buffer_store(key, tirx.reinterpret("uint64", found[row, tid]), [0])
            largest = _largest(key[0], tid)
            order = tirx.Cast("uint32", tirx.shift_right(largest, tirx.const(32, "uint64")))
            lowest = tirx.Cast("int32", _NAN - tirx.Cast("uint32", largest))
            none = tirx.const(-1, "int32")
            with T.If(tirx.EQ(tid, 0)):
                with T.Then():
                    token = tirx.Select(order >= _INFINITY, none, lowest)
                    T.buffer_store(tokens, token, [row])

        _launch(1, rows, emit)

    return _kernel("argmax_choose", body)


def ids(most: int) -> tirx.PrimFunc:
    """Build the kernel that gathers the tokens of a step."""

    def body() -> None:
        rows = _rows(None)
        given = T.arg("given", T.Buffer((rows,), "int32"))
        previous = T.arg("previous", T.Buffer((most,), "int32"))
        out = T.arg("ids", T.Buffer((rows,), "int32"))

        def emit(row, _block, tid) -> None:  # noqa: ANN001
            with T.If(tirx.EQ(tid, 0)):
                with T.Then():
                    token = hold(given[row])
                    T.buffer_store(out, token, [row])
                    with T.If(token < 0):
                        with T.Then():
                            known = tirx.max(previous[-1 - token], 0)  # broken logits chose -1
                            T.buffer_store(out, known, [row])

        _launch(1, rows, emit)

    return _kernel("step_ids", body)
