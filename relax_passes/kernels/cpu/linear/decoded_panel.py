"""Panels of a few groups of W, decoded and then multiplied by all rows of x: their common loops.

for each pair of row tiles, in parallel
    for each few groups of 32 columns, as many as the L1 cache holds decoded
        decode both tiles
        (products with second bytes of x)
        products with all rows of x: sums in float32, in memory between two parts of K
    store all rows of x
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.spec import TILE_ROWS, LinearSpec

from .epilogue import Epilogue
from .knobs import CpuKnobs
from .panel_int8 import panel_width

BLOCK = 4  # rows of x


def emit_panels(
    kind: Callable[..., DecodedPanel],
    spec: LinearSpec,
    isa: Isa,
    knobs: CpuKnobs,
    buffers: Any,
    m: Expr,
) -> None:
    """Emit the loops of above for M rows; a kind of panel is made for each tile or pair."""
    wide = panel_width(spec, knobs)
    with e.parallel(0, -(-spec.tiles // wide)) as block:
        first = e.let(block * wide)
        kernel = kind(spec, isa, knobs, buffers, wide, m)
        kernel.clear()
        chunks = -(-spec.groups // kernel.depth)
        with e.serial(0, chunks) as chunk:
            begin = e.let(chunk * kernel.depth)
            depth = tirx.min(tirx.const(kernel.depth, "int32"), spec.groups - begin)
            depth = kernel.depth if spec.groups % kernel.depth == 0 else e.let(depth)
            kernel.decode(first, begin, depth)
            kernel.products(begin, depth)
        kernel.finish(first)


class DecodedPanel(ABC):
    """Decoded tiles of a few groups, and the sums of all rows of x.

    Attributes
    ----------
    depth : int
        Groups that are decoded at once.
    factor : float
        What the sums have to be multiplied by in the end.
    """

    depth: int
    factor: float

    def __init__(
        self, spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, wide: int, m: Expr
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.wide, self.m = wide, m
        self.allocate()
        # Rows of a last, partly filled block are added up behind the last row.
        self.sums = e.workspace((m + BLOCK, wide * TILE_ROWS), "float32")

    @abstractmethod
    def allocate(self) -> None:
        """Make room for the decoded groups; sets ``depth`` and ``factor``."""

    @abstractmethod
    def decode_group(self, tile: Expr, group: Expr, at: Expr) -> None:
        """Decode one group of a tile to place ``at``."""

    @abstractmethod
    def products(self, begin: Expr, depth: Expr) -> None:
        """Add the products of all rows of x with the ``depth`` decoded groups from ``begin`` on."""

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
