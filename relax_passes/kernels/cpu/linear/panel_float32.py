"""The linear on float32 activations for many rows of x: W is decoded to float32 once.

The loops are those of decoded_panel.py.  Each row's sum takes its products in the order of columns,
as in float32.py: what a row is does not depend on how many there are.

    panel weights  float32 [tiles, groups, 32 columns, 16 rows]
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx2 import Avx2
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

from .decoded_panel import BLOCK, DecodedPanel, emit_panels
from .float_weights import FloatWeights
from .knobs import CpuKnobs

GROUPS = 8  # of a tile: 2 KiB each in the L1 cache
UNROLLED = 4  # columns


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    fits = isinstance(isa, Avx2) and spec.activation.exact and spec.format != "none"
    if not fits or spec.experts or spec.k % GROUP:
        return None
    return max(knobs.panel_rows, BLOCK)


def emit_panel(spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    emit_panels(_Panel, spec, isa, knobs, buffers, m)


class _Panel(DecodedPanel):
    """Tiles as float32."""

    def allocate(self) -> None:
        """Make room for the weights."""
        spec = self.spec
        self.weights = FloatWeights(spec, self.isa, self.buffers)
        self.factor = self.weights.factor
        self.depth = -(-spec.groups // -(-spec.groups // GROUPS))
        self.decoded = e.workspace((self.wide * self.depth, GROUP, TILE_ROWS), "float32")

    def decode_group(self, tile: Expr, group: Expr, at: Expr) -> None:
        """Decode the weights of one tile and group."""
        w, lanes = self.weights, self.isa.rows
        per_sub = w.vectors // w.reader.sub_groups
        for part in range(self.isa.parts):
            for sub in range(w.reader.sub_groups):
                scales = w.scales(tile, group, sub, part)
                with e.serial(sub * per_sub, (sub + 1) * per_sub) as v:
                    for j, values in enumerate(w.columns(tile, group, part, v, scales)):
                        weight = w.weight(values, scales)
                        place = (at, v * w.step + j, part * lanes)
                        e.store(self.decoded, weight, *place, lanes=lanes)

    def products(self, begin: Expr, depth: Expr) -> None:
        """Add the products of all rows of x; one tile's weights stay in the L1 cache for them."""
        lanes, parts = self.isa.rows, self.isa.parts
        blocks = tirx.floordiv(self.m + (BLOCK - 1), tirx.const(BLOCK, "int32"))
        with e.serial(0, self.wide) as c, e.serial(0, e.let(blocks)) as block:
            to = [e.let(block * BLOCK + i) for i in range(BLOCK)]
            rows = [to[0], *(e.let(tirx.min(t, self.m - 1)) for t in to[1:])]
            columns = [e.let(c * TILE_ROWS + part * lanes) for part in range(parts)]
            sums = [
                [
                    e.Register("float32", lanes, e.load(self.sums, t, at, lanes=lanes))
                    for at in columns
                ]
                for t in to
            ]
            with e.serial(0, depth * (GROUP // UNROLLED)) as some:
                first = e.let(some * UNROLLED)
                for i in range(UNROLLED):
                    self._column(c, begin, first + i, rows, sums)
            for t, own in zip(to, sums, strict=True):
                for at, total in zip(columns, own, strict=True):
                    e.store(self.sums, total.get(), t, at, lanes=lanes)

    def _column(
        self, c: Expr, begin: Expr, column: Expr, rows: list[Expr], sums: list[list[e.Register]]
    ) -> None:
        """Add the products of one column of the decoded groups."""
        lanes, width = self.isa.rows, tirx.const(GROUP, "int32")
        at = c * self.depth + tirx.truncdiv(column, width)
        inside = tirx.truncmod(column, width)
        weights = [
            e.let(e.load(self.decoded, at, inside, part * lanes, lanes=lanes))
            for part in range(self.isa.parts)
        ]
        for row, own in zip(rows, sums, strict=True):
            x = e.let(e.splat(e.load(self.buffers["x"], row, begin * GROUP + column), lanes))
            for total, weight in zip(own, weights, strict=True):
                total.set(e.fma(x, weight, total.get(), lanes))
