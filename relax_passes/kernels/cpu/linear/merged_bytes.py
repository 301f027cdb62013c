"""The linear on int8 activations for a few rows of x on Arm: a group is decoded once for them.

For one tile of 16 rows and one group of 32 columns

    signed bytes and scales, on the stack (lane_blocks.py, matrix_blocks.py)
    for each four rows of x and each half of the tile's rows: products, scaled into float32
    sums of all rows of x on the stack

Decoding costs what the products of some five rows do: blocks of fewer than eight keep the terms
apart (lane_tile.py).
"""

from __future__ import annotations

from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.isa.neon import NeonDot, NeonMatrix
from relax_passes.spec import TILE_ROWS, LinearSpec

from . import signed_bytes
from .knobs import CpuKnobs
from .lane_blocks import COLUMNS, PARTS, LaneBlocks
from .matrix_blocks import MatrixBlocks
from .tile import ActivationCodes, Tile
from .x_blocks import ROWS

BLOCK = 2 * ROWS  # of x


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows of a block from which on this is the direct kernel's tile."""
    fits = isinstance(isa, NeonDot) and signed_bytes.supports(spec, isa)
    return max(knobs.merge_rows, BLOCK) if fits else None


def blocks_of(spec: LinearSpec, isa: Isa, buffers: Any) -> LaneBlocks:
    """Return what multiplies blocks on an instruction set."""
    kind = MatrixBlocks if isinstance(isa, NeonMatrix) else LaneBlocks
    return kind(spec, isa, buffers)


class BytesTile:
    """Code generator for one tile of 16 rows of W; the interface of ``rows.tile_pair``."""

    def __init__(
        self,
        spec: LinearSpec,
        isa: Isa,
        knobs: CpuKnobs,
        buffers: Any,
        kernel: Tile,
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.blocks = blocks_of(spec, isa, buffers)
        self.kernel, self.epilogue = kernel, kernel.epilogue

    def product(self, tile: Expr, row: Expr, rows: int) -> list[list[e.Register]]:
        """Emit the loop over K; returns float32 registers [row][part]."""
        lanes, blocks = self.isa.rows, self.blocks
        tile, x = e.let(tile), ActivationCodes("", self.buffers, 1)
        codes, scales = blocks.allocate(1)
        sums = e.workspace((rows, TILE_ROWS), "float32")
        for r in range(rows):
            e.store(sums, e.const(0.0, "float32", TILE_ROWS), r, 0, lanes=TILE_ROWS)
        with e.serial(0, self.spec.groups) as group:
            self.knobs.prefetch_tile(self.spec, self.buffers, tile, group)
            blocks.decode(tile, group, e.const(0), codes, scales)
            with e.serial(0, rows // ROWS) as four:
                to = [e.let(four * ROWS + i) for i in range(ROWS)]
                given = blocks.form.make(x, [e.let(row + t) for t in to], group, blocks.start)
                with e.serial(0, PARTS) as part:
                    column = e.let(part * COLUMNS)
                    out = blocks.load_sums(sums, to, column)
                    blocks.add(codes, scales, e.const(0), part, given, out)
                    blocks.store_sums(sums, out, to, column)
        # In the units of the direct kernel, which adds the products with second bytes.
        unit = e.const(blocks.factor / self.kernel.factor, "float32", lanes)
        out = [
            [
                e.Register("float32", lanes, e.load(sums, r, p * lanes, lanes=lanes) * unit)
                for p in range(self.isa.parts)
            ]
            for r in range(rows)
        ]
        self.kernel.add_second_bytes(tile, row, out)
        return out
