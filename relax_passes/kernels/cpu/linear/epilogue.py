"""What happens to a tile's sums before they are stored: scale, bias, silu(gate) * up, residual.

The sums of one row of x arrive as float32 vectors of ``lanes`` outputs.  Only the last tile can be
ragged (N is no multiple of 16); it is detoured through a small stack buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.math import silu
from relax_passes.spec import TILE_ROWS, LinearSpec

FEW_ROWS = 4  # with fewer, the lines of y are no burden


class Kept(NamedTuple):
    """Stack buffers, one a row, that take a pair's values from ``start`` on."""

    rows: list[Any]
    start: Expr


class Epilogue:
    """Finishes and stores the outputs of one row of x and one tile (or pair of tiles).

    ``expert`` says whose part of the tensor scales and biases it is.
    """

    def __init__(
        self,
        spec: LinearSpec,
        buffers: Mapping[str, Any],
        lanes: int,
        factor: float,
        expert: Expr | None = None,
    ):
        self.spec, self.buffers, self.lanes, self.factor = spec, buffers, lanes, factor
        self.expert = expert
        self.ragged = spec.n % TILE_ROWS

    def _partial(self, tile: Expr) -> Expr:
        return tile == self.spec.tiles - 1

    def expect(self, t: Expr, row: Expr, rows: int) -> None:
        """Ask for the lines of y that a block of rows of one tile (or pair) will write.

        In the residual stream and the logits they are another core's, or in memory.
        """
        if rows >= FEW_ROWS:
            for r in range(rows):
                e.prefetch(self.buffers["y"], row + r, t * TILE_ROWS, write=True)

    def finish(self, sums: Expr, tile: Expr, first: int) -> Expr:
        """Apply the format's common factor, the tensor scale and the bias."""
        lanes = self.lanes
        if self.factor != 1.0:
            sums = sums * e.const(self.factor, "float32", lanes)
        if "tile_scale" in self.buffers:
            start = 0 if self.expert is None else self.expert * self.spec.tiles
            sums = sums * e.splat(e.load(self.buffers["tile_scale"], start + tile), lanes)
        if self.spec.bias:
            start = 0 if self.expert is None else self.expert * self.spec.n
            sums = sums + self._load(self.buffers["bias"], (), tile, first, start)
        return e.let(sums)

    def _load(self, buffer: Any, row: tuple, tile: Expr, first: int, start: Expr = 0) -> Expr:
        """Load 16-row data of true length N behind ``start``; lanes beyond N are zero."""
        at = tile * TILE_ROWS + first + start
        if not self.ragged:
            return e.load(buffer, *row, at, lanes=self.lanes)
        value = e.Register("float32", self.lanes, e.const(0.0, "float32", self.lanes))
        with e.when(self._partial(tile)):
            with e.then():
                for i in range(max(0, min(self.lanes, self.ragged - first))):
                    e.store(value.buffer, e.load(buffer, *row, at + i), i)
            with e.otherwise():
                value.set(e.load(buffer, *row, at, lanes=self.lanes))
        return e.let(value.get())

    def store(self, value: Expr, row: Expr, tile: Expr, first: int) -> None:
        """Add the residual and store the outputs of a tile."""
        y, at = self.buffers["y"], tile * TILE_ROWS + first
        if self.spec.residual:
            value = e.let(value + self._load(self.buffers["residual"], (row,), tile, first))
        value = self._stored(value)
        if not self.ragged:
            e.store(y, value, row, at, lanes=self.lanes)
            return
        with e.when(self._partial(tile)):
            with e.then():
                spill = e.Register(self.spec.out_dtype, self.lanes, value)
                for i in range(max(0, min(self.lanes, self.ragged - first))):
                    e.store(y, e.load(spill.buffer, i), row, at + i)
                e.I.evaluate(tirx.const(0, "int32"))
            with e.otherwise():
                e.store(y, value, row, at, lanes=self.lanes)

    def gated(self, gate: Expr, up: Expr, row: Expr, pair: Expr, first: int) -> Expr:
        """Return silu(gate) * up for tiles 2 * pair and 2 * pair + 1 (never ragged)."""
        value = silu(gate, self.lanes) * up
        if self.spec.residual:
            at = pair * TILE_ROWS + first
            value = value + e.load(self.buffers["residual"], row, at, lanes=self.lanes)
        return value

    def _stored(self, value: Expr) -> Expr:
        """Round to the type of y."""
        dtype = self.spec.out_dtype
        return value if dtype == "float32" else e.let(e.cast(value, dtype, self.lanes))

    def rows(
        self, sums: list[list[list[Expr]]], t: Expr, row: Expr, kept: Kept | None = None
    ) -> None:
        """Finish and store the sums [tile of the pair][row][part] of tile (or pair) ``t``.

        ``kept`` takes the values of a pair instead of y.
        """
        span, lanes = len(sums), self.lanes
        for r in range(len(sums[0])):
            for part in range(TILE_ROWS // lanes):
                first = part * lanes
                done = [self.finish(sums[s][r][part], t * span + s, first) for s in range(span)]
                if span == 1:
                    self.store(done[0], row + r, t, first)
                    continue
                value = self.gated(done[0], done[1], row + r, t, first)
                if kept is not None:
                    e.store(kept.rows[r], value, kept.start + first, lanes=lanes)
                else:
                    at, value = t * TILE_ROWS + first, self._stored(value)
                    e.store(self.buffers["y"], value, row + r, at, lanes=lanes)
