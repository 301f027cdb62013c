"""Panels (decoded_panel.py) that are multiplied in blocks of rows of x, by parts of a tile's rows.

    for each few groups of 32 columns that are decoded
        the products with second bytes of x, by lists of rows (low_bytes.py)
        for each block of rows of x and a part of a tile's rows: sums in float32

Sums of a block are in registers for one part of K and in memory between two parts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.spec import TILE_ROWS, LinearSpec

from .decoded_panel import BLOCK, DecodedPanel, emit_panels
from .knobs import CpuKnobs
from .low_bytes import turn_lists
from .sums import scope
from .tile import ActivationCodes


def emit_blocks(
    kind: Callable[..., BlockPanel],
    spec: LinearSpec,
    isa: Isa,
    knobs: CpuKnobs,
    buffers: Any,
    m: Expr,
) -> None:
    """Emit the whole linear for M rows, M being worth a panel of the given kind."""
    lists = None
    if spec.activation.outliers:
        lists = turn_lists(buffers["outliers"], m, spec.groups)
    with scope(isa, spec):
        emit_panels(partial(kind, lists), spec, isa, knobs, buffers, m)


class BlockPanel(DecodedPanel):
    """A panel with parts of a tile's rows.

    Attributes
    ----------
    lanes, parts : int
        Rows of W of a block, and how many such parts a tile has; ``allocate`` sets the first.
    lists : Buffer or None
        Which rows have second bytes in a group (low_bytes.py).
    """

    lanes: int

    def __init__(self, lists: Any, *args: Any):
        self.lists = lists
        super().__init__(*args)

    @property
    def parts(self) -> int:
        """Parts of a tile's rows."""
        return TILE_ROWS // self.lanes

    @abstractmethod
    def add_group(
        self,
        x: ActivationCodes,
        rows: list[Expr],
        place: Expr,
        part: Expr,
        group: Expr,
        out: Any,
    ) -> None:
        """Add the products of ``rows`` of x with a part of the group at ``place`` to ``out``."""

    def load_sums(self, to: list[Expr], column: Expr) -> Any:
        """Load the sums of rows ``to`` into registers: one of ``lanes`` a row."""
        return [
            e.Register("float32", self.lanes, e.load(self.sums, t, column, lanes=self.lanes))
            for t in to
        ]

    def store_sums(self, out: Any, to: list[Expr], column: Expr) -> None:
        """Store what ``load_sums`` made."""
        for t, register in zip(to, out, strict=True):
            e.store(self.sums, register.get(), t, column, lanes=self.lanes)

    def products(self, begin: Expr, depth: Expr) -> None:
        """Add the products of all rows of x, those with second bytes first."""
        if self.lists is not None:
            self._second_bytes(self.lists, begin, depth)
        x = ActivationCodes("", self.buffers, 1)
        blocks = tirx.floordiv(self.m + (BLOCK - 1), tirx.const(BLOCK, "int32"))
        with self._vectors() as (c, part), e.serial(0, e.let(blocks)) as block:
            to = [e.let(block * BLOCK + i) for i in range(BLOCK)]
            rows = [to[0], *(e.let(tirx.min(t, self.m - 1)) for t in to[1:])]
            self._block(x, rows, to, c, part, begin, 0, depth)

    def _second_bytes(self, rows_of_groups: Any, begin: Expr, depth: Expr) -> None:
        """Add the products of second bytes of x: of a group's rows, some at once."""
        x = ActivationCodes("_low", self.buffers, 1)
        with e.serial(0, depth) as g:
            group = e.let(begin + g)
            count = e.let(e.load(rows_of_groups, group, 0))
            blocks = tirx.floordiv(count + (BLOCK - 1), tirx.const(BLOCK, "int32"))
            with self._vectors() as (c, part), e.serial(0, e.let(blocks)) as block:
                places = [e.let(block * BLOCK + i) for i in range(BLOCK)]
                found = [e.load(rows_of_groups, group, tirx.min(p, count - 1) + 1) for p in places]
                rows = [e.let(row) for row in found]
                to = [
                    e.let(tirx.Select(p < count, row, self.m + i))
                    for i, (p, row) in enumerate(zip(places, rows, strict=True))
                ]
                self._block(x, rows, to, c, part, begin, g, 1)

    @contextmanager
    def _vectors(self) -> Iterator[tuple[Expr, Expr]]:
        """Open the loops over the vectors of W's rows: (tile of the panel, part).

        They are the outer ones: one vector's codes stay in the L1 cache for all rows of x.
        """
        with e.serial(0, self.wide) as c, e.serial(0, self.parts) as part:
            yield c, part

    def _block(
        self,
        x: ActivationCodes,
        rows: list[Expr],
        to: list[Expr],
        c: Expr,
        part: Expr,
        begin: Expr,
        first: Expr,
        count: Expr,
    ) -> None:
        """Add the products of a vector of W's rows with ``rows`` of x to the sums of rows ``to``.

        They are of ``count`` groups of the panel from ``first`` on.
        """
        column = e.let(c * TILE_ROWS + part * self.lanes)
        out = self.load_sums(to, column)
        with e.serial(0, count) as g:
            place = e.let(c * self.depth + (first + g))
            self.add_group(x, rows, place, part, e.let(begin + (first + g)), out)
        self.store_sums(out, to, column)
