"""Four rows of x times eight of W where an instruction multiplies matrices (smmla): 2 x 8 by 8 x 2.

As lane_blocks.py, but a vector is two rows of W, or of x, by eight columns, and a sum

    (x row 0, W row 0), (x row 0, W row 1), (x row 1, W row 0), (x row 1, W row 1)

Half as many instructions multiply.  Rows of x are brought together first (x_blocks.py).

    codes   int8    [places, 2 parts, 4 steps, 4 pairs of rows * 16]
    scales  float32 [places, 2, 32]     scales, and what is added, each pair twice
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.neon import NeonMatrix
from relax_passes.spec import GROUP, TILE_ROWS

from .lane_blocks import PARTS, VECTORS, LaneBlocks
from .x_blocks import BYTES, HIGH, IN_PAIRS, LANES, LOW, mixed, mixed_bytes

STEPS = GROUP // 8


class MatrixBlocks(LaneBlocks):
    """Emits the decode of a tile's groups and the products of blocks with them."""

    form = IN_PAIRS

    def allocate(self, places: int) -> tuple[Any, Any]:
        """Make room for codes and scales."""
        codes = e.workspace((places * PARTS, STEPS, 2 * VECTORS * BYTES), "int8")
        return codes, e.workspace((places, 2, 2 * TILE_ROWS), "float32")

    def decode(self, tile: Expr, group: Expr, at: Expr, codes: Any, scales: Any) -> None:
        """Decode the bytes and scales of one tile and group to place ``at``."""
        transforms, scale = self.decoder.prepare(tile, group)
        self._store_scales(scales, e.let(scale), at)
        count = 2 // self.decoder.steps  # packed vectors that eight columns are in
        with e.serial(0, STEPS) as step:
            for quarter, transform in enumerate(transforms):
                low, high = (
                    value
                    for i in range(count)
                    for value in self._vector(tile, group, step * count + i, quarter, transform)
                )
                part, four = divmod(quarter, VECTORS)
                for i, order in enumerate(((0, 4, 1, 5), (2, 6, 3, 7))):
                    to = (four * 2 + i) * BYTES
                    pair = mixed_bytes(low, high, order)
                    e.store(codes, pair, at * PARTS + part, step, to, lanes=BYTES)

    def _store_scales(self, scales: Any, scale: Expr, at: Expr) -> None:
        """Store the scales of a tile and group, and what is added, in the order of the sums."""
        order = [2 * (i // 4) + i % 2 for i in range(2 * TILE_ROWS)]
        twice = e.let(tirx.Shuffle([scale, scale], [tirx.const(i, "int32") for i in order]))
        minus = twice * e.const(-1.5 * 2**23, "float32", 2 * TILE_ROWS)
        for i, value in enumerate((twice, e.let(minus))):
            e.store(scales, value, at, i, 0, lanes=2 * TILE_ROWS)

    def load_sums(self, sums: Any, to: list[Expr], column: Expr) -> Any:
        """Load the sums of rows ``to`` into registers: [pair of rows][pair of W's rows]."""
        out = []
        for pair in zip(to[::2], to[1::2], strict=True):
            registers = []
            for v in range(VECTORS):
                both = [e.let(e.load(sums, t, column + v * LANES, lanes=LANES)) for t in pair]
                for order in (LOW, HIGH):
                    registers.append(e.Register("float32", LANES, mixed(both[0], both[1], order)))
            out.append(registers)
        return out

    def store_sums(self, sums: Any, out: Any, to: list[Expr], column: Expr) -> None:
        """Store what ``load_sums`` made."""
        for pair, registers in zip(zip(to[::2], to[1::2], strict=True), out, strict=True):
            for v in range(VECTORS):
                both = [e.let(r.get()) for r in registers[2 * v : 2 * v + 2]]
                for t, order in zip(pair, (LOW, HIGH), strict=True):
                    at = column + v * LANES
                    e.store(sums, mixed(both[0], both[1], order), t, at, lanes=LANES)

    def _multiply(
        self, codes: Any, at: Expr, given: list[list[Expr]], acc: list[list[Expr]]
    ) -> None:
        """Add the products of a group."""
        isa: NeonMatrix = self.isa
        for step in range(STEPS):
            for p in range(len(acc[0])):
                w = e.let(e.load(codes, at, step, p * BYTES, lanes=BYTES))
                for own, pair in zip(acc, given, strict=True):
                    own[p] = e.let(isa.matrix_dot(own[p], pair[step], w))

    def _x_scale(self, scales: list[Expr], i: int) -> Expr:
        """Return the scales that the i-th sums take."""
        return scales[i]
