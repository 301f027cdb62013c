"""The mean of each of several spans of rows: how texts become vectors."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..intrinsics.base import local

THREADS = 128


def mean_rows(k: int) -> tirx.PrimFunc:
    """Build the kernel: x float16 [rows, k], spans int32 [n, 2] -> means float16 [n, k].

    A span is its first row and the one past its last; an empty one gives zeros. Sums are float32.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("mean_rows")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
            rows, count = tirx.Var("rows", "int64"), tirx.Var("n", "int64")
            x = T.arg("x", T.Buffer((rows, k), "float16"))
            spans = T.arg("spans", T.Buffer((count, 2), "int32"))
            means = T.arg("means", T.Buffer((count, k), "float16"))
            threads = [
                T.thread_binding(count, thread="blockIdx.x"),
                T.thread_binding(-(-k // THREADS), thread="blockIdx.y"),
                T.thread_binding(THREADS, thread="threadIdx.x"),
            ]
            with T.frame_scope(threads) as (span, piece, thread):
                with T.sblock("means"):
                    T.reads()
                    T.writes()
                    column = piece * THREADS + thread
                    with T.If(column < k):
                        with T.Then():
                            _mean(x, spans, means, span, column)
    return builder.get().without_attr("global_symbol")


def _mean(x, spans, means, span, column) -> None:  # noqa: ANN001
    """Emit the mean of a column of a span."""
    total, one = local(1), tirx.const(1, "int32")
    T.buffer_store(total, tirx.const(0.0, "float32"), [0])
    first = T.bind(spans[span, 0])
    length = T.bind(spans[span, 1] - first)
    with T.serial(length) as i:
        T.buffer_store(total, total[0] + tirx.Cast("float32", x[first + i, column]), [0])
    share = tirx.Cast("float32", tirx.max(length, one))
    T.buffer_store(means, tirx.Cast("float16", total[0] / share), [span, column])
