"""Four rows of x side by side, as panels of signed bytes take them; made once for all of W.

    codes   int8    [M / 4, G, n, s, 16]
    starts  int32   [M / 4, G, n, 4]       of sums
    scales  float32 [M / 4, G, c, 4]

    BY_LANES   n = 4 rows, s = 2: 16 columns; a row's start four times; c = 1: the rows' scales
    IN_PAIRS   n = 2 pairs, s = 4: row 0's eight columns, row 1's; c = 2: both as row 0, 0, 1, 1

Second bytes, of rows from lists, are brought together where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.spec import GROUP, LinearSpec

from .tile import ActivationCodes

ROWS = 4
BYTES, LANES = 16, 4  # of a vector
LOW, HIGH = (0, 1, 4, 5), (2, 3, 6, 7)  # halves of two vectors
Start = Callable[[ActivationCodes, Expr, Expr], Expr]  # of (x, row, group)


class Four(NamedTuple):
    """A group of four rows: codes [n][s], starts [n] and scales [c]."""

    codes: list[list[Expr]]
    starts: list[Expr]
    scales: list[Expr]


class Form(NamedTuple):
    """How four rows lie side by side: the numbers of above, and what makes it."""

    n: int
    s: int
    c: int
    make: Callable[[ActivationCodes, list[Expr], Expr, Start], Four]


def _by_lanes(x: ActivationCodes, rows: list[Expr], group: Expr, start: Start) -> Four:
    scales = [x.scale(row, group, 0) for row in rows]
    vector = e.let(tirx.Shuffle(scales, [tirx.const(i, "int32") for i in range(ROWS)]))
    starts = [e.let(e.splat(start(x, row, group), LANES)) for row in rows]
    return Four([_columns(x, row, group) for row in rows], starts, [vector])


def _in_pairs(x: ActivationCodes, rows: list[Expr], group: Expr, start: Start) -> Four:
    pairs = list(zip(rows[::2], rows[1::2], strict=True))

    def twice(value: Callable[[Expr], Expr]) -> list[Expr]:
        each = [[e.splat(value(row), LANES) for row in pair] for pair in pairs]
        return [e.let(mixed(one, other, LOW)) for one, other in each]

    codes = [
        [
            e.let(mixed_bytes(one, other, order))
            for one, other in zip(*(_columns(x, row, group) for row in pair), strict=True)
            for order in (LOW, HIGH)
        ]
        for pair in pairs
    ]
    starts = twice(lambda row: start(x, row, group))
    return Four(codes, starts, twice(lambda row: x.scale(row, group, 0)))


BY_LANES = Form(4, 2, 1, _by_lanes)
IN_PAIRS = Form(2, 4, 2, _in_pairs)


class XBlocks:
    """The rows of x in a form; rows behind the last one repeat it."""

    def __init__(self, spec: LinearSpec, m: Expr, form: Form):
        self.spec, self.m, self.form = spec, m, form
        self.units = tirx.floordiv(m + (ROWS - 1), tirx.const(ROWS, "int32"))
        shape = (self.units, spec.groups)
        self.codes = e.workspace((*shape, form.n, form.s * BYTES), "int8")
        self.starts = e.workspace((*shape, form.n, LANES), "int32")
        self.scales = e.workspace((*shape, form.c, LANES), "float32")

    def make(self, buffers: Any, start: Start) -> None:
        """Make all rows, in parallel."""
        x = ActivationCodes("", buffers, 1)
        with e.parallel(0, self.units) as unit:
            rows = [e.let(tirx.min(unit * ROWS + i, self.m - 1)) for i in range(ROWS)]
            with e.serial(0, self.spec.groups) as group:
                made = self.form.make(x, rows, group, start)
                for i, codes in enumerate(made.codes):
                    for step, value in enumerate(codes):
                        e.store(self.codes, value, unit, group, i, step * BYTES, lanes=BYTES)
                for i, value in enumerate(made.starts):
                    e.store(self.starts, value, unit, group, i, 0, lanes=LANES)
                for i, value in enumerate(made.scales):
                    e.store(self.scales, value, unit, group, i, 0, lanes=LANES)

    def load(self, unit: Expr, group: Expr) -> Four:
        """Load a group of four rows."""
        form = self.form

        def vectors(buffer: Any, count: int) -> list[Expr]:
            return [e.let(e.load(buffer, unit, group, i, 0, lanes=LANES)) for i in range(count)]

        codes = [
            [
                e.let(e.load(self.codes, unit, group, i, step * BYTES, lanes=BYTES))
                for step in range(form.s)
            ]
            for i in range(form.n)
        ]
        return Four(codes, vectors(self.starts, form.n), vectors(self.scales, form.c))


def mixed(one: Expr, other: Expr, order: tuple[int, ...]) -> Expr:
    """Choose four of eight lanes of 32 bits."""
    return tirx.Shuffle([one, other], [tirx.const(i, "int32") for i in order])


def mixed_bytes(one: Expr, other: Expr, order: tuple[int, ...]) -> Expr:
    """Choose four of eight lanes of four bytes."""
    words = [e.bits(value, "int32", LANES) for value in (one, other)]
    return e.bits(mixed(words[0], words[1], order), "int8", BYTES)


def _columns(x: ActivationCodes, row: Expr, group: Expr) -> list[Expr]:
    return [
        e.let(e.load(x.codes, row, group * GROUP + at, lanes=BYTES))
        for at in range(0, GROUP, BYTES)
    ]
