"""The linear on int8 activations for many rows of x, where products take four bytes of a lane.

The loops are those of panel_blocks.py; a block is four rows of x and eight of W.  A panel is signed
bytes with one scale a group (signed_bytes.py).  A product adds four columns of four rows of W with
one row of x, which is a lane of a register: 16 columns of a row are one.  Eight int32 sums and
eight of float32, four registers of x and two of W leave none of 32 on the stack.

Sums start at the bits of 1.5 * 2^23 (group_sums.py), so that as float32 they are that plus the sum;
a multiplication that adds -1.5 * 2^23 scales brings them to float32 and scales them, exactly.  The
largest scales of E8M0 would overflow: there sums are converted.

    panel codes   int8    [tiles, groups, 2 parts, 8 steps, 2 * 16]
    panel scales  float32 [tiles, groups, 2, 16]     scales, and what is added
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx

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
from .signed_bytes import SignedBytes, Transform
from .tile import ActivationCodes
from .x_blocks import BY_LANES, BYTES, LANES, ROWS, Start, XBlocks

STEPS = GROUP // 4
GROUPS = 64  # of a part of a tile: 256 bytes each in the L1 cache


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    fits = isinstance(isa, NeonDot) and signed_bytes.supports(spec, isa) and not spec.experts
    return max(knobs.panel_rows, BLOCK) if fits else None


def emit_panel(spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    emit_bytes(BytesPanel, spec, isa, knobs, buffers, m)


def emit_bytes(
    kind: type[BytesPanel], spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr
) -> None:
    """Emit a kind of panel behind what it needs of x."""
    blocks = XBlocks(spec, m, kind.form)
    blocks.make(buffers, starts(spec))
    emit_blocks(partial(kind, blocks=blocks), spec, isa, knobs, buffers, m)


def by_bits(spec: LinearSpec) -> bool:
    """Whether sums become float32 by their bits."""
    return all(t.type.name != "E8M0" for t in spec.fmt.scale_tensors)


def starts(spec: LinearSpec) -> Start:
    """Return (x, row, group) -> what the sums of a row and group start with."""
    first, offset = FIRST if by_bits(spec) else 0, signed_bytes.offset(spec.fmt)

    def start(x: ActivationCodes, row: Expr, group: Expr) -> Expr:
        if not offset:
            return e.const(first, "int32")
        return e.let(e.const(first, "int32") - x.sum(row, group, 0) * offset)

    return start


class BytesPanel(BlockPanel):
    """Tiles as signed bytes, eight rows of W a block."""

    isa: NeonDot
    form = BY_LANES

    def __init__(self, *args: Any, blocks: XBlocks):
        super().__init__(*args)
        self.blocks = blocks

    def allocate(self) -> None:
        """Make room for bytes and scales."""
        self.lanes, self.vectors = 8, 8 // LANES
        self.factor = common_factor(self.spec.fmt.terms)
        self.by_bits, self.start_of = by_bits(self.spec), starts(self.spec)
        self.decoder = SignedBytes(self.spec, self.isa, self.reader)
        self.depth = -(-self.spec.groups // -(-self.spec.groups // GROUPS))
        codes, scales = self.shapes
        self.codes, self.scales = e.workspace(codes, "int8"), e.workspace(scales, "float32")

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of codes and scales."""
        places = self.wide * self.depth
        return (places * self.parts, STEPS, self.vectors * BYTES), (places, 2, TILE_ROWS)

    def decode_group(self, tile: Expr, group: Expr, at: Expr) -> None:
        """Decode the bytes and scales of one tile and group."""
        decoder = self.decoder
        transforms, scale = decoder.prepare(tile, group)
        self._store_scales(e.let(scale), at)
        with e.serial(0, STEPS // decoder.steps) as v:
            for quarter, transform in enumerate(transforms):
                part, vector = divmod(quarter, self.vectors)
                for i, value in enumerate(self._vector(tile, group, v, quarter, transform)):
                    to, step = at * self.parts + part, v * decoder.steps + i
                    e.store(self.codes, value, to, step, vector * BYTES, lanes=BYTES)

    def _store_scales(self, scale: Expr, at: Expr) -> None:
        """Store the scales of a tile and group, and what is added, in the order of the sums."""
        minus = scale * e.const(-1.5 * 2**23, "float32", TILE_ROWS)
        for i, value in enumerate((scale, e.let(minus))):
            e.store(self.scales, value, at, i, 0, lanes=TILE_ROWS)

    def _vector(
        self, tile: Expr, group: Expr, v: Expr, quarter: int, transform: Transform
    ) -> list[Expr]:
        """Decode four rows of a packed vector: int8 of 16, for each four columns."""
        at = v * 64 + quarter * BYTES
        packed = e.let(e.load(self.buffers["w_codes"], tile, group, at, lanes=BYTES))
        return self.decoder.bytes(packed, transform)

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
        """Add one group's products to ``out``: [row or pair of x][vector of W]."""
        at = e.let(place * self.parts + part)
        if x.second:
            given = self.form.make(x, rows, group, self.start_of)
        else:
            given = self.blocks.load(e.let(rows[0] // ROWS), group)
        count = len(out[0])
        acc = [[e.Register("int32", LANES, start) for _ in range(count)] for start in given.starts]
        self._multiply(at, given.codes, acc)
        for v in range(count):
            column = e.let((part * count + v) * LANES)
            scale, origin = (
                e.let(e.load(self.scales, place, i, column, lanes=LANES)) for i in range(2)
            )
            for i, (own, registers) in enumerate(zip(acc, out, strict=True)):
                value = self._scaled(own[v].get(), scale, origin)
                x_scale = self._x_scale(given.scales, i)
                registers[v].set(e.fma(value, x_scale, registers[v].get(), LANES))

    def _multiply(self, at: Expr, codes: list[list[Expr]], acc: list[list[e.Register]]) -> None:
        """Add the products of a group."""
        for step in range(STEPS):
            register, lane = divmod(step, BYTES // 4)
            for v in range(self.vectors):
                w = e.let(e.load(self.codes, at, step, v * BYTES, lanes=BYTES))
                for own, row in zip(acc, codes, strict=True):
                    own[v].set(self.isa.lane_dot(own[v].get(), w, row[register], lane))

    def _x_scale(self, scales: list[Expr], i: int) -> Expr:
        """Return the scales that the i-th sums take."""
        return tirx.Shuffle(scales, [tirx.const(i, "int32")] * LANES)

    def _scaled(self, total: Expr, scale: Expr, origin: Expr) -> Expr:
        """Turn sums into float32, scaled by the weights' scales."""
        if not self.by_bits:
            return e.let(e.cast(total, "float32", LANES) * scale)
        return e.let(e.fma(e.bits(total, "float32", LANES), scale, origin, LANES))
