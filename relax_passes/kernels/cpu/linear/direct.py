"""The linear on integer activations: integer products a group, float32 sums over groups.

For one tile of 16 rows and one group of 32 columns (the "pn8" kernel):

    for each packed vector v (columns 8v..8v+3 in low nibbles, 8v+4..8v+7 in high ones)
        bytes = table lookup;  lane r of the int32 accumulator += four bytes . four activations
    y[r] += x_scale * sum over terms of  sign * w_scale[r] * (accumulator[r] - offset * x_sum)

Weights are unsigned bytes, activations signed, so vpdpbusd needs no bias and no sign trick.  A
group's four activations are one 32-bit broadcast; a row of W is one lane: no horizontal sums.
M > 1 runs the same text on blocks of rows of x, so that decoded bytes are used several times.
Sums are in 16 bits where an instruction set has it so and they hold a group (sums.py).

Activations in four bits (W4A4) are several arrays of small integers, for AMXFP4 the values of
either sign: two terms of W times two of x are four accumulators of small-integer products.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.isa.neon import NeonDot
from relax_passes.spec import LinearSpec

from . import merged, merged_bytes, merged_words, panel
from .block_notes import MOST_ROWS, UNIT, BlockNotes
from .by_group import PAIRS, GroupQuantizer
from .knobs import CpuKnobs
from .lane_tile import LaneTile
from .merged import MergedTile
from .merged_bytes import BytesTile
from .merged_words import WordsTile
from .rows import Part, each_tile, row_blocks, tile_group, tile_pair
from .sums import scope
from .tile import Tile
from .x_words import XWords

ACCUMULATORS = 16  # int32 vectors that a block of rows may keep in registers


def from_rows(spec: LinearSpec, _isa: Isa, _knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    return None if spec.activation.exact else 1


def emit_direct(spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows."""
    notes = block_notes(spec, isa, knobs, buffers)
    if notes is not None:
        if spec.m:
            notes.make(m)
        else:
            with e.when(m >= notes.unit), e.then():
                notes.make(m)
    Direct(spec, isa, knobs, buffers, m, notes).tiles()


class Direct:
    """The kernel that decodes a tile again for every block of rows of x.

    ``notes`` are what larger blocks of rows need, made before ``tiles`` emits the parallel loop;
    ``quantizer`` takes groups of the result instead of y.
    """

    def __init__(
        self,
        spec: LinearSpec,
        isa: Isa,
        knobs: CpuKnobs,
        buffers: Any,
        m: Expr,
        notes: BlockNotes | XWords | None,
        quantizer: GroupQuantizer | None = None,
    ):
        self.spec, self.isa, self.knobs, self.buffers, self.m = spec, isa, knobs, buffers, m
        self.notes, self.quantizer = notes, quantizer
        kind = merged_words if isinstance(notes, XWords) else merged
        if isinstance(isa, NeonDot):
            kind = merged_bytes
        self.merge_rows = kind.from_rows(spec, isa, knobs)

    def tiles(self) -> None:
        """Emit the parallel loop."""
        span = 2 if self.spec.silu_mul else 1
        if self.quantizer is not None:
            span *= PAIRS
        words = self.isa.words_scope() if isinstance(self.notes, XWords) else nullcontext()
        with scope(self.isa, self.spec), words:
            with each_tile(self.spec, self.buffers, self.m, span) as part:
                self._tile(part)

    def _tile(self, part: Part) -> None:
        spec, isa, knobs, buffers = self.spec, self.isa, self.knobs, self.buffers
        kind = LaneTile if isinstance(isa, NeonDot) else Tile
        kernel = kind(spec, isa, knobs, buffers, part.expert)
        most = max(1, ACCUMULATORS // (len(kernel.terms) * len(kernel.x)))
        sizes = [s for s in isa.block if s <= most] or [1]
        merging: MergedTile | WordsTile | BytesTile | None = None
        if isinstance(self.notes, XWords):
            merging = WordsTile(spec, isa, knobs, buffers, self.notes)
            sizes = [merged_words.BLOCK, *sizes]
        elif isinstance(isa, NeonDot) and self.merge_rows is not None:
            merging = BytesTile(spec, isa, knobs, buffers, kernel)
            # Four rows would be half as much text again; two and two are nearly as fast.
            sizes = [merged_bytes.BLOCK, *(s for s in sizes if s < 4)]
        elif self.merge_rows is not None:
            assert isinstance(isa, Avx512)
            second = kernel.add_second_bytes
            merging = MergedTile(spec, isa, knobs, buffers, self.notes, second, part.expert)
            sizes = list(isa.block)

        def body(row: Expr, rows: int) -> None:
            merges = self.merge_rows is not None and rows >= self.merge_rows
            one = merging if merges else kernel
            row = e.let(row + part.first)
            if self.quantizer is None:
                tile_pair(spec, one, part, row, rows)
            else:
                tile_group(spec, one, part, row, rows, self.quantizer)

        row_blocks(part.count, knobs.blocks(sizes, spec.m), body)


def block_notes(
    spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any
) -> BlockNotes | XWords | None:
    """Make room for what blocks of several rows need; None where it does not pay.

    Eight-bit weights are their own bytes: a pass of its own for second bytes costs little there.
    """
    most = spec.m or spec.m_max or max(knobs.panel_rows, knobs.panel_block)
    if (rows := merged_words.from_rows(spec, isa, knobs)) is not None:
        return XWords(spec, buffers, most, rows) if rows <= most <= MOST_ROWS else None
    eight_bit = spec.fmt.terms[0].table is None
    pays = spec.activation.outliers and not eight_bit and not spec.experts
    if merged.from_rows(spec, isa, knobs) is None or not pays or not UNIT <= most <= MOST_ROWS:
        return None
    return BlockNotes(spec, buffers, most, panel.offset(spec.fmt))
