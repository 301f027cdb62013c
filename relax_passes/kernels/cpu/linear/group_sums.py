"""How the int32 sums of a group become float32, scaled.

Usually by a conversion and a multiplication.  Where every scale of W is a power of two (merge.py
makes them so) neither is needed: sums start at the bits of the float32 1.5 * 2^23, so that after
any integers with |sum| < 2^22 the bits are those of

    1.5 * 2^23 + sum

Adding e << 23 to the bits multiplies it by 2^e, and subtracting 1.5 * 2^23 * 2^e leaves
sum * 2^e: exact, and the port that multiplies, which the products keep busy, does none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.spec import TILE_ROWS

FIRST = 0x4B400000  # bits of 1.5 * 2^23
ONE = 0x3F800000  # bits of 1.0


def by_exponent(fmt: Any) -> bool:
    """Whether a format's merged scales are powers of two that stay normal numbers."""
    return len(fmt.terms) == 2 and {t.type.name for t in fmt.scale_tensors} == {"E5M2"}


def first(fmt: Any) -> int:
    """Return what every accumulator starts with, beside what offsets cost."""
    return FIRST if by_exponent(fmt) else 0


def scaling(fmt: Any, scale: Expr, own: Expr | None = None) -> Callable[[Expr], Expr]:
    """Return int32 sums of 16 rows -> float32 (sums + own) times ``scale``, float32 of 16 rows.

    ``own`` int32 of 16 rows, |own| < 2^22, is a number of W's: by exponents it costs a row of x
    nothing.
    """
    lanes = TILE_ROWS
    if not by_exponent(fmt):
        return lambda total: e.let(
            e.cast(total if own is None else total + own, "float32", lanes) * scale
        )
    bits = e.bits(scale, "int32", lanes)
    shift = e.let(bits - e.const(ONE, "int32", lanes))
    begin = e.const(FIRST, "int32", lanes)
    origin = e.let(e.bits(shift + (begin if own is None else begin - own), "float32", lanes))
    return lambda total: e.let(e.bits(total + shift, "float32", lanes) - origin)
