"""The linear on int8 activations for many rows of x, on Arm's products of signed bytes.

The loops are those of panel_blocks.py; a block is four rows of x and eight of W (lane_blocks.py,
matrix_blocks.py), and rows of x are brought side by side once (x_blocks.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.spec import LinearSpec

from . import merged_bytes
from .decoded_panel import BLOCK
from .knobs import CpuKnobs
from .lane_blocks import COLUMNS, LaneBlocks
from .merged_bytes import blocks_of
from .panel_blocks import BlockPanel, emit_blocks
from .tile import ActivationCodes
from .x_blocks import ROWS, XBlocks

GROUPS = 64  # of a part of a tile: 256 bytes each in the L1 cache


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    fits = merged_bytes.from_rows(spec, isa, knobs) is not None and not spec.experts
    return max(knobs.panel_rows, BLOCK) if fits else None


def emit_panel(spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    blocks = blocks_of(spec, isa, buffers)
    x = XBlocks(spec, m, blocks.form)
    x.make(buffers, blocks.start)
    emit_blocks(partial(_Panel, blocks=blocks, x=x), spec, isa, knobs, buffers, m)


class _Panel(BlockPanel):
    """Tiles as signed bytes."""

    def __init__(self, *args: Any, blocks: LaneBlocks, x: XBlocks):
        self.blocks, self.x = blocks, x
        super().__init__(*args)

    def allocate(self) -> None:
        """Make room for bytes and scales."""
        self.lanes, self.factor = COLUMNS, self.blocks.factor
        self.depth = -(-self.spec.groups // -(-self.spec.groups // GROUPS))
        self.codes, self.scales = self.blocks.allocate(self.wide * self.depth)

    def decode_group(self, tile: Expr, group: Expr, at: Expr) -> None:
        """Decode the bytes and scales of one tile and group."""
        self.blocks.decode(tile, group, at, self.codes, self.scales)

    def load_sums(self, to: list[Expr], column: Expr) -> Any:
        """Load the sums of rows ``to`` into registers."""
        return self.blocks.load_sums(self.sums, to, column)

    def store_sums(self, out: Any, to: list[Expr], column: Expr) -> None:
        """Store what ``load_sums`` made."""
        self.blocks.store_sums(self.sums, out, to, column)

    def add_group(
        self,
        x: ActivationCodes,
        rows: list[Expr],
        place: Expr,
        part: Expr,
        group: Expr,
        out: Any,
    ) -> None:
        """Add one group's products to ``out``."""
        if x.second:
            given = self.blocks.form.make(x, rows, group, self.blocks.start)
        else:
            given = self.x.load(rows[0] // ROWS, group)
        self.blocks.add(self.codes, self.scales, place, part, given, out)
