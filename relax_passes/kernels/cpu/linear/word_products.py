"""The sums of a group's products of 16-bit words, for some rows of x and some vectors of W's rows.

A step is two columns. The first one is a multiplication alone: adding it to zeros would be one of
32 operations. The others are a loop, not that much text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr

from .pair_words import STEPS

UNROLLED = 5  # steps behind the first one


def word_products(
    isa: Any, rows: int, words: Callable[[Expr], list[Expr]], pair: Callable[[int, Expr], Expr]
) -> list[list[e.Register]]:
    """Emit the products; returns int32 registers [row of x][vector].

    ``words`` loads the vectors of a step, ``pair`` the two words of a row and step in all lanes.
    """

    def step(at: Expr, use: Callable[[int, list[Expr], Expr], None]) -> None:
        weights = words(at)
        for row in range(rows):
            use(row, weights, pair(row, at))

    acc: list[list[e.Register]] = []

    def first(_row: int, weights: list[Expr], x: Expr) -> None:
        acc.append([e.Register("int32", isa.rows, isa.words_first(w, x)) for w in weights])

    def more(row: int, weights: list[Expr], x: Expr) -> None:
        for total, weight in zip(acc[row], weights, strict=True):
            total.set(isa.words_dot(total.get(), weight, x))

    step(e.const(0), first)
    with e.serial(0, (STEPS - 1) // UNROLLED) as some:
        for i in range(UNROLLED):
            step(some * UNROLLED + (i + 1), more)
    return acc
