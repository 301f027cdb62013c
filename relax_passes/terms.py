"""How a kernel sees a number format: tables of small unsigned bytes, scales and offsets.

A format says value = sum over terms of factor * scale * (table[code] - offset)
(``Format.terms``).  Kernels sum a * table over a group in integers; an offset costs the group's sum
of activations, which activations carry per scale of theirs (int8: 32 columns).  Formats with
smaller groups (nvfp4) have no such sums, so their constant offset is traded for a second table:
table - offset is split into its positive and its negative part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from relax_passes.activation import GROUP


@dataclass(frozen=True)
class Term:
    """One summand: sign * scale * (table[code] - offset); the common factor is kept apart."""

    table: tuple[int, ...] | None  # None: the byte itself
    scale: str
    factor: float
    offset: int | str


@cache
def kernel_terms(fmt: Any, sum_group: int = GROUP) -> tuple[Term, ...]:
    """List the terms of a format as kernels use them, given sums over ``sum_group`` columns."""
    terms = []
    for t in fmt.terms:
        table = None if t.table is None else tuple(int(v) for v in t.table)
        if (
            fmt.group_size < sum_group
            and table is not None
            and isinstance(t.offset, int)
            and t.offset
        ):
            above = tuple(max(v - t.offset, 0) for v in table)
            below = tuple(max(t.offset - v, 0) for v in table)
            terms.append(Term(above, t.scale, float(t.factor), 0))
            terms.append(Term(below, t.scale, -float(t.factor), 0))
        else:
            terms.append(Term(table, t.scale, float(t.factor), t.offset))
    return tuple(terms)


def common_factor(terms: tuple[Term, ...]) -> float:
    """Return the magnitude that all factors share; it is applied once, in the epilogue."""
    factors = {abs(t.factor) for t in terms}
    return factors.pop() if len(factors) == 1 else 1.0
