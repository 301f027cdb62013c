"""Splitting M rows of x into blocks of fixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx

from ..spec import LinearSpec
from . import emit as e
from .emit import Expr


def row_blocks(m: Expr, sizes: Sequence[int], body: Callable[[Expr, int], None]) -> None:
    """Run ``body(first row, rows)`` over M rows: big blocks first, then smaller ones to the end."""
    if isinstance(m, tirx.IntImm):
        done, total = 0, int(m)
        for size in sizes:
            count = (total - done) // size
            if count:
                first = done
                with e.serial(0, count) as i:
                    body(first + i * size, size)
                done += count * size
        return
    done = tirx.const(0, "int32")
    for i, size in enumerate(sizes):
        start, left = done, m - done
        count = e.let(tirx.truncdiv(left, tirx.const(size, "int32")))
        single = i > 0 and sizes[i - 1] == 2 * size  # then at most one block of this size is left
        if single:
            with e.when(count > 0), e.then():
                body(start, size)
        else:
            with e.serial(0, count) as block:
                body(start + block * size, size)
        done = e.let(start + count * size)


def either(
    m: Expr, spec: LinearSpec, threshold: int, few: Callable[[], None], many: Callable[[], None]
) -> None:
    """Run ``many()`` when M reaches the threshold, ``few()`` below it.

    Only what can happen is emitted: one of the two for a static M or a small ``m_max``.
    """
    if isinstance(m, tirx.IntImm):
        (many if int(m) >= threshold else few)()
    elif spec.m_max is not None and spec.m_max < threshold:
        few()
    else:
        with e.when(m >= threshold):
            with e.then():
                many()
            with e.otherwise():
                few()
