"""The loops of a panel of a few groups: decoded, then multiplied by blocks of rows of x.

    for each pair of row tiles, in parallel
        for each few groups of 32 columns, as many as the L1 cache holds decoded
            decode both tiles
            the products with second bytes of x, by lists of rows (low_bytes.py)
            for each block of rows of x and a part of a tile's rows: sums in float32
        store all rows of x

Sums of a block are in registers for one part of K and in memory between two parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import TILE_ROWS, LinearSpec

from .epilogue import Epilogue
from .knobs import CpuKnobs
from .low_bytes import turn_lists
from .panel_int8 import panel_width
from .sums import scope
from .tile import ActivationCodes

BLOCK = 4  # rows of x


def emit_blocks(
    kind: Callable[..., BlockPanel],
    spec: LinearSpec,
    isa: Isa,
    knobs: CpuKnobs,
    buffers: Any,
    m: Expr,
) -> None:
    """Emit the whole linear for M rows, M being worth a panel of the given kind."""
    wide = panel_width(spec, knobs)
    rows_of_groups = None
    if spec.activation.outliers:
        rows_of_groups = turn_lists(buffers["outliers"], m, spec.groups)
    with scope(isa, spec), e.parallel(0, -(-spec.tiles // wide)) as block:
        first = e.let(block * wide)
        kernel = kind(spec, isa, knobs, buffers, wide, m)
        kernel.clear()
        chunks = -(-spec.groups // kernel.depth)
        with e.serial(0, chunks) as chunk:
            begin = e.let(chunk * kernel.depth)
            depth = tirx.min(tirx.const(kernel.depth, "int32"), spec.groups - begin)
            depth = kernel.depth if spec.groups % kernel.depth == 0 else e.let(depth)
            kernel.decode(first, begin, depth)
            if rows_of_groups is not None:
                kernel.second_bytes(rows_of_groups, begin, depth)
            kernel.products(begin, depth)
        kernel.finish(first)


class BlockPanel:
    """Decoded tiles of a few groups, and the sums of all rows of x.

    Attributes
    ----------
    lanes, parts : int
        Rows of W of a block, and how many such parts a tile has.
    depth : int
        Groups that are decoded at once.
    factor : float
        What the sums have to be multiplied by in the end.
    """

    lanes: int
    depth: int
    factor: float

    def __init__(
        self, spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, wide: int, m: Expr
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.wide, self.m = wide, m
        self.reader = ScaleReader(spec.fmt, buffers["w_scales"])
        self.allocate()
        # Rows of a last, partly filled block are added up behind the last row.
        self.sums = e.workspace((m + BLOCK, wide * TILE_ROWS), "float32")

    @property
    def parts(self) -> int:
        """Parts of a tile's rows."""
        return TILE_ROWS // self.lanes

    def allocate(self) -> None:
        """Make room for the decoded groups; sets ``lanes``, ``depth`` and ``factor``."""
        raise NotImplementedError

    def decode_group(self, tile: Expr, group: Expr, at: Expr) -> None:
        """Decode one group of a tile to place ``at``."""
        raise NotImplementedError

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
        raise NotImplementedError

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

    def clear(self) -> None:
        """Set the sums to 0."""
        width = self.wide * TILE_ROWS
        with e.serial(0, self.m + BLOCK) as row:
            e.store(self.sums, e.const(0.0, "float32", width), row, 0, lanes=width)

    def decode(self, first: Expr, begin: Expr, depth: Expr) -> None:
        """Decode the groups ``begin``... of all tiles."""
        spec = self.spec
        with e.serial(0, self.wide) as c, e.serial(0, depth) as g:
            tile = first + c
            if spec.tiles % self.wide:
                tile = e.clamped(tile, spec.tiles - 1)
            tile, group = e.let(tile), e.let(begin + g)
            at = e.let(c * self.depth + g)
            self.knobs.prefetch_tile(spec, self.buffers, tile, group)
            self.decode_group(tile, group, at)

    def products(self, begin: Expr, depth: Expr) -> None:
        """Add the products of all rows of x."""
        x = ActivationCodes("", self.buffers, 1)
        blocks = tirx.floordiv(self.m + (BLOCK - 1), tirx.const(BLOCK, "int32"))
        with self._vectors() as (c, part), e.serial(0, e.let(blocks)) as block:
            to = [e.let(block * BLOCK + i) for i in range(BLOCK)]
            rows = [to[0], *(e.let(tirx.min(t, self.m - 1)) for t in to[1:])]
            self._block(x, rows, to, c, part, begin, 0, depth)

    def second_bytes(self, rows_of_groups: Any, begin: Expr, depth: Expr) -> None:
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

    def finish(self, first: Expr) -> None:
        """Store all rows; in a last, partly filled panel the tiles beyond W are dropped."""
        spec, lanes = self.spec, self.isa.rows
        epilogue = Epilogue(spec, self.buffers, lanes, self.factor)
        span = 2 if spec.silu_mul else 1

        def load(row: Expr, c: int) -> list[list[Expr]]:
            columns = [c * TILE_ROWS + p * lanes for p in range(self.isa.parts)]
            return [[e.let(e.load(self.sums, row, at, lanes=lanes)) for at in columns]]

        def store(row: Expr, c: int, tile: Expr) -> None:
            epilogue.rows([load(row, c + i) for i in range(span)], tile, row)

        with e.serial(0, self.m) as row:
            for c in range(0, self.wide, span):
                tile = e.let((first + c) // span if span > 1 else first + c)
                if c and spec.tiles % self.wide:
                    with e.when(tile * span < spec.tiles), e.then():
                        store(row, c, tile)
                else:
                    store(row, c, tile)
