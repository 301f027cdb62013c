"""The mean of each of several spans of rows: how texts become vectors."""

from __future__ import annotations

from typing import Any

from . import emit as e

LANES = 16


def mean_rows(k: int) -> Any:
    """Build the kernel: x float32 [rows, k], spans int32 [n, 2] -> means float32 [n, k].

    A span is its first row and the one past its last; an empty one gives zeros.
    """
    with e.IRBuilder() as builder:
        with e.I.prim_func(s_tir=True):
            e.I.func_name("mean_rows")
            e.I.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            handles = [e.I.arg(name, e.I.handle()) for name in ("x", "spans", "means")]
            rows, count = e.I.int64(), e.I.int64()
            x = e.I.match_buffer(handles[0], (rows, k), "float32", align=4)
            spans = e.I.match_buffer(handles[1], (count, 2), "int32", align=4)
            means = e.I.match_buffer(handles[2], (count, k), "float32", align=4)
            with e.parallel(0, e.let(e.cast(count, "int32"))) as span:
                first = e.let(spans[span, 0])
                last = e.let(spans[span, 1])
                one = e.const(1.0, "float32")
                share = e.let(one / e.cast(e.tirx.max(last - first, 1), "float32"))
                _columns(x, means, k // LANES, 0, LANES, (span, first, last, share))
                _columns(x, means, k % LANES, k // LANES * LANES, 1, (span, first, last, share))
        return builder.get()


def _columns(x: Any, means: Any, steps: int, start: int, lanes: int, span: tuple) -> None:
    """Average columns from ``start`` on, ``lanes`` at a time."""
    if not steps:
        return
    row, first, last, share = span
    with e.serial(0, steps) as i:
        column = e.let(start + i * lanes)
        total = e.Register("float32", lanes, e.const(0.0, "float32", lanes))
        with e.serial(first, last) as r:
            total.set(total.get() + e.load(x, r, column, lanes=lanes))
        e.store(means, total.get() * e.splat(share, lanes), row, column, lanes=lanes)
