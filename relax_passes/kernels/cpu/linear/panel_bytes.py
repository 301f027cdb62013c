"""The linear on int8 activations for many rows of x, where products take four bytes of a lane.

The loops are those of panel_blocks.py; a block is four rows of x and eight of W.  A panel is signed
bytes with one scale a group (signed_bytes.py).  A product adds four columns of four rows of W with
one row of x, which is a lane of a register: 16 columns of a row are one.  Eight int32 sums and
eight of float32, four registers of x and two of W leave none of 32 on the stack.

Sums start at the bits of 1.5 * 2^23 (group_sums.py), so that as float32 they are that plus the sum;
a multiplication that adds -1.5 * 2^23 scales brings them to float32 and scales them, exactly.

    panel codes   int8    [tiles, groups, 2 parts, 8 steps, 2 * 16]
    panel scales  float32 [tiles, groups, 2, 16]     scales, and what is added
"""

from __future__ import annotations

from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.isa.neon import NeonDot
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec
from relax_passes.terms import common_factor

from . import signed_bytes
from .group_sums import FIRST
from .knobs import CpuKnobs
from .panel_blocks import BLOCK, BlockPanel, emit_blocks
from .signed_bytes import SignedBytes
from .tile import ActivationCodes

STEPS = GROUP // 4
GROUPS = 64  # of a part of a tile: 256 bytes each in the L1 cache
BYTES, LANES = 16, 4  # of a vector


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    fits = isinstance(isa, NeonDot) and signed_bytes.supports(spec, isa) and not spec.experts
    return max(knobs.panel_rows, BLOCK) if fits else None


def emit_panel(spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    emit_blocks(_Panel, spec, isa, knobs, buffers, m)


class _Panel(BlockPanel):
    """Tiles as signed bytes, eight rows of W a block."""

    isa: NeonDot

    def allocate(self) -> None:
        """Make room for bytes and scales."""
        self.lanes, self.vectors = 8, 8 // LANES
        self.factor = common_factor(self.spec.fmt.terms)
        self.decoder = SignedBytes(self.spec, self.isa, self.reader)
        self.depth = -(-self.spec.groups // -(-self.spec.groups // GROUPS))
        places = self.wide * self.depth
        self.codes = e.workspace((places * self.parts, STEPS, self.vectors * BYTES), "int8")
        self.scales = e.workspace((places, 2, TILE_ROWS), "float32")

    def decode_group(self, tile: Expr, group: Expr, at: Expr) -> None:
        """Decode the bytes and scales of one tile and group."""
        decoder = self.decoder
        transforms, scale = decoder.prepare(tile, group)
        scale = e.let(scale)
        e.store(self.scales, scale, at, 0, 0, lanes=TILE_ROWS)
        origin = scale * e.const(-1.5 * 2**23, "float32", TILE_ROWS)
        e.store(self.scales, origin, at, 1, 0, lanes=TILE_ROWS)
        with e.serial(0, STEPS // decoder.steps) as v:
            for quarter, transform in enumerate(transforms):
                packed = self.buffers["w_codes"]
                packed = e.let(e.load(packed, tile, group, v * 64 + quarter * BYTES, lanes=BYTES))
                part, vector = divmod(quarter, self.vectors)
                for i, value in enumerate(decoder.bytes(packed, transform)):
                    step = v * decoder.steps + i
                    to = at * self.parts + part
                    e.store(self.codes, value, to, step, vector * BYTES, lanes=BYTES)

    def load_sums(self, to: list[Expr], column: Expr) -> Any:
        """Load the sums of rows ``to`` into registers: [row][vector]."""
        return [
            [
                e.Register("float32", LANES, e.load(self.sums, t, column + v * LANES, lanes=LANES))
                for v in range(self.vectors)
            ]
            for t in to
        ]

    def store_sums(self, out: Any, to: list[Expr], column: Expr) -> None:
        """Store what ``load_sums`` made."""
        for t, registers in zip(to, out, strict=True):
            for v, register in enumerate(registers):
                e.store(self.sums, register.get(), t, column + v * LANES, lanes=LANES)

    def add_group(
        self,
        x: ActivationCodes,
        rows: list[Expr],
        place: Expr,
        part: Expr,
        group: Expr,
        out: Any,
    ) -> None:
        """Add one group's products to ``out``, [row][vector]."""
        at = e.let(place * self.parts + part)
        acc = [self._start(x, row, group) for row in rows]
        for first in range(0, GROUP, BYTES):
            words = [
                e.let(e.load(x.codes, row, group * GROUP + first, lanes=BYTES)) for row in rows
            ]
            for lane in range(BYTES // 4):
                step = first // 4 + lane
                for v in range(self.vectors):
                    w = e.let(e.load(self.codes, at, step, v * BYTES, lanes=BYTES))
                    for own, word in zip(acc, words, strict=True):
                        own[v].set(self.isa.lane_dot(own[v].get(), w, word, lane))
        for v in range(self.vectors):
            column = e.let(part * self.lanes + v * LANES)
            scale, origin = (
                e.let(e.load(self.scales, place, i, column, lanes=LANES)) for i in range(2)
            )
            for own, row, registers in zip(acc, rows, out, strict=True):
                value = e.let(e.fma(e.bits(own[v].get(), "float32", LANES), scale, origin, LANES))
                x_scale = e.splat(x.scale(row, group, 0), LANES)
                registers[v].set(e.fma(value, x_scale, registers[v].get(), LANES))

    def _start(self, x: ActivationCodes, row: Expr, group: Expr) -> list[e.Register]:
        """Return the sums of a row with each vector of W, at their start."""
        first = e.const(FIRST, "int32")
        if self.decoder.offset:
            first = first - x.sum(row, group, 0) * self.decoder.offset
        start = e.let(e.splat(first, LANES))
        return [e.Register("int32", LANES, start) for _ in range(self.vectors)]
