"""The most likely token on the GPU: 4 bytes to the host a step instead of the logits.

    best    logits float32 [1, vocab] -> int64 [BLOCKS]: the largest of every block's share
    choose  int64 [BLOCKS] -> token int32 [1]; -1 where logits hold NaN or infinity

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

BLOCKS, _THREADS = 128, 256

_NAN = tirx.const(0xFFFFFFFF, "uint32")
_INFINITY = tirx.const(0xFF800000, "uint32")  # order of infinity


def _kernel(name: str, body: Callable, blocks: int) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            body(blocks)
    return builder.get().without_attr("global_symbol")


def _launch(blocks: int, emit: Callable) -> None:
    """Emit a grid whose threads have a key each; the first of a block gets the block's largest."""
    threads = [
        T.thread_binding(blocks, thread="blockIdx.x"),
        T.thread_binding(_THREADS, thread="threadIdx.x"),
    ]
    with T.frame_scope(threads) as (block, tid):
        with T.sblock("argmax"):
            T.reads()
            T.writes()
            emit(block, tid)


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


def best(vocab: int) -> tirx.PrimFunc:
    """Build the first kernel."""

    def body(blocks: int) -> None:
        logits = T.arg("logits", T.Buffer((1, vocab), "float32"))
        out = T.arg("best", T.Buffer((BLOCKS,), "int64"))

        def emit(block, tid) -> None:  # noqa: ANN001
            key = local(1, "uint64")
            T.buffer_store(key, tirx.const(0, "uint64"), [0])
            step = _THREADS * blocks
            with T.serial(-(-vocab // step)) as i:
                token = i * step + block * _THREADS + tid
                with T.If(token < vocab):
                    with T.Then():
                        mine = hold(_key(logits[0, token], token))
                        T.buffer_store(key, tirx.max(key[0], mine), [0])
            found = _largest(key[0], tid)
            with T.If(tirx.EQ(tid, 0)):
                with T.Then():
                    T.buffer_store(out, tirx.reinterpret("int64", found), [block])

        _launch(blocks, emit)

    return _kernel("argmax_best", body, BLOCKS)


def choose() -> tirx.PrimFunc:
    """Build the second kernel."""

    def body(blocks: int) -> None:
        found = T.arg("best", T.Buffer((BLOCKS,), "int64"))
        token = T.arg("token", T.Buffer((1,), "int32"))

        def emit(_block, tid) -> None:  # noqa: ANN001
            key = local(1, "uint64")
            T.buffer_store(key, tirx.const(0, "uint64"), [0])
            with T.If(tid < BLOCKS):
                with T.Then():
                    T.buffer_store(key, tirx.reinterpret("uint64", found[tid]), [0])
            largest = _largest(key[0], tid)
            order = tirx.Cast("uint32", tirx.shift_right(largest, tirx.const(32, "uint64")))
            lowest = tirx.Cast("int32", _NAN - tirx.Cast("uint32", largest))
            none = tirx.const(-1, "int32")
            with T.If(tirx.EQ(tid, 0)):
                with T.Then():
                    T.buffer_store(token, tirx.Select(order >= _INFINITY, none, lowest), [0])

        _launch(blocks, emit)

    return _kernel("argmax_choose", body, 1)
