"""Four rows of x times eight of W, signed bytes, where a lane of a register is four columns of x.

W is signed bytes with one scale a group (signed_bytes.py).  A product adds four columns of four
rows of W with one row of x, a lane: 16 columns of a row are one register.  Eight int32 sums and
eight of float32, four registers of x and two of W leave none of 32 on the stack.

Sums start at the bits of 1.5 * 2^23 (group_sums.py), so that as float32 they are that plus the sum;
a multiplication that adds -1.5 * 2^23 scales brings them to float32 and scales them, exactly.  The
largest scales of E8M0 would overflow: there sums are converted.

    codes   int8    [places, 2 parts, 8 steps, 2 * 16]      a place is a group of a tile
    scales  float32 [places, 2, 16]     scales, and what is added
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.neon import NeonDot
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec
from relax_passes.terms import common_factor

from . import signed_bytes
from .group_sums import FIRST
from .signed_bytes import SignedBytes, Transform
from .tile import ActivationCodes
from .x_blocks import BY_LANES, BYTES, LANES, Four

COLUMNS = 8  # rows of W in a block
PARTS = TILE_ROWS // COLUMNS
VECTORS = COLUMNS // LANES
STEPS = GROUP // 4


class LaneBlocks:
    """Emits the decode of a tile's groups and the products of blocks with them.

    Attributes
    ----------
    factor : float
        What the sums have to be multiplied by in the end.
    """

    form = BY_LANES

    def __init__(self, spec: LinearSpec, isa: Any, buffers: Any):
        self.spec, self.isa, self.buffers = spec, isa, buffers
        self.factor = common_factor(spec.fmt.terms)
        self.by_bits = all(t.type.name != "E8M0" for t in spec.fmt.scale_tensors)
        self.offset = signed_bytes.offset(spec.fmt)
        self.decoder = SignedBytes(spec, isa, ScaleReader(spec.fmt, buffers["w_scales"]))

    def allocate(self, places: int) -> tuple[Any, Any]:
        """Make room for codes and scales."""
        codes = e.workspace((places * PARTS, STEPS, VECTORS * BYTES), "int8")
        return codes, e.workspace((places, 2, TILE_ROWS), "float32")

    def start(self, x: ActivationCodes, row: Expr, group: Expr) -> Expr:
        """Return what the sums of a row and group start with."""
        first = e.const(FIRST if self.by_bits else 0, "int32")
        return first - x.sum(row, group, 0) * self.offset if self.offset else first

    def decode(self, tile: Expr, group: Expr, at: Expr, codes: Any, scales: Any) -> None:
        """Decode the bytes and scales of one tile and group to place ``at``."""
        transforms, scale = self.decoder.prepare(tile, group)
        self._store_scales(scales, e.let(scale), at)
        with e.serial(0, STEPS // self.decoder.steps) as v:
            for quarter, transform in enumerate(transforms):
                part, vector = divmod(quarter, VECTORS)
                for i, value in enumerate(self._vector(tile, group, v, quarter, transform)):
                    to, step = at * PARTS + part, v * self.decoder.steps + i
                    e.store(codes, value, to, step, vector * BYTES, lanes=BYTES)

    def _store_scales(self, scales: Any, scale: Expr, at: Expr) -> None:
        """Store the scales of a tile and group, and what is added, in the order of the sums."""
        minus = scale * e.const(-1.5 * 2**23, "float32", TILE_ROWS)
        for i, value in enumerate((scale, e.let(minus))):
            e.store(scales, value, at, i, 0, lanes=TILE_ROWS)

    def _vector(
        self, tile: Expr, group: Expr, v: Expr, quarter: int, transform: Transform
    ) -> list[Expr]:
        """Decode four rows of a packed vector: int8 of 16, for each four columns."""
        at = v * 64 + quarter * BYTES
        packed = e.let(e.load(self.buffers["w_codes"], tile, group, at, lanes=BYTES))
        return self.decoder.bytes(packed, transform)

    def load_sums(self, sums: Any, to: list[Expr], column: Expr) -> Any:
        """Load the sums of rows ``to`` into registers: [row][vector]."""
        return [
            [
                e.Register("float32", LANES, e.load(sums, t, column + v * LANES, lanes=LANES))
                for v in range(VECTORS)
            ]
            for t in to
        ]

    def store_sums(self, sums: Any, out: Any, to: list[Expr], column: Expr) -> None:
        """Store what ``load_sums`` made."""
        for t, registers in zip(to, out, strict=True):
            for v, register in enumerate(registers):
                e.store(sums, register.get(), t, column + v * LANES, lanes=LANES)

    def add(self, codes: Any, scales: Any, place: Expr, part: Expr, given: Four, out: Any) -> None:
        """Add the products of four rows of x with a part of the group at ``place`` to ``out``."""
        count = len(out[0])
        acc = [[start] * count for start in given.starts]
        self._multiply(codes, e.let(place * PARTS + part), given.codes, acc)
        for v in range(count):
            column = e.let((part * count + v) * LANES)
            scale, minus = (e.let(e.load(scales, place, i, column, lanes=LANES)) for i in range(2))
            for i, (own, registers) in enumerate(zip(acc, out, strict=True)):
                value = e.let(self._scaled(own[v], scale, minus))
                x_scale = self._x_scale(given.scales, i)
                registers[v].set(e.fma(value, x_scale, registers[v].get(), LANES))

    def _multiply(
        self, codes: Any, at: Expr, given: list[list[Expr]], acc: list[list[Expr]]
    ) -> None:
        """Add the products of a group."""
        isa: NeonDot = self.isa
        for step in range(STEPS):
            register, lane = divmod(step, BYTES // 4)
            for v in range(VECTORS):
                w = e.let(e.load(codes, at, step, v * BYTES, lanes=BYTES))
                for own, row in zip(acc, given, strict=True):
                    own[v] = e.let(isa.lane_dot(own[v], w, row[register], lane))

    def _x_scale(self, scales: list[Expr], i: int) -> Expr:
        """Return the scales that the i-th sums take."""
        return tirx.Shuffle(scales, [tirx.const(i, "int32")] * LANES)

    def _scaled(self, total: Expr, scale: Expr, minus: Expr) -> Expr:
        """Turn sums into float32, scaled by the weights' scales."""
        if not self.by_bits:
            return e.cast(total, "float32", LANES) * scale
        return e.fma(e.bits(total, "float32", LANES), scale, minus, LANES)
