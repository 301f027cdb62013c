"""The linear on float32 activations: exact weights, float32 products and sums (the strict mode).

Each four-bit code becomes a float32 lane by table.  One row of x keeps the terms of a format apart
and scales each group's sum; a block of rows scales the decoded weight once and uses it for all of
them.  A ragged last group of columns reads x through a zero-padded copy on the stack.
"""

from __future__ import annotations

from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.spec import GROUP, LinearSpec

from .epilogue import Epilogue
from .float_weights import FloatWeights
from .knobs import CpuKnobs
from .rows import each_tile, row_blocks, tile_pair


def from_rows(spec: LinearSpec, _isa: Isa, _knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    return 1 if spec.activation.exact else None


def emit_float32(spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows."""
    with each_tile(spec, buffers, m, 2 if spec.silu_mul else 1) as part:
        kernel = _Tile(spec, isa, knobs, buffers, part.expert)

        def body(row: Expr, rows: int) -> None:
            tile_pair(spec, kernel, part, e.let(row + part.first), rows)

        row_blocks(part.count, knobs.blocks(isa.block, spec.m), body)


class _Tile:
    """Code generator for one tile of 16 rows of W."""

    def __init__(
        self, spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, expert: Expr | None
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.weights = FloatWeights(spec, isa, buffers)
        self.epilogue = Epilogue(spec, buffers, isa.rows, self.weights.factor, expert)

    def product(self, tile: Expr, row: Expr, rows: int) -> list[list[e.Register]]:
        """Emit the loop over K; returns float32 registers [row][part]."""
        isa, spec = self.isa, self.spec
        zero = e.const(0.0, "float32", isa.rows)
        tile = e.let(tile)
        out = [
            [e.Register("float32", isa.rows, zero) for _ in range(isa.parts)] for _ in range(rows)
        ]
        whole = spec.k // GROUP
        if whole:
            with e.serial(0, whole) as group:
                self.knobs.prefetch_tile(spec, self.buffers, tile, group)
                self._group(tile, group, self.buffers["x"], row, group * GROUP, out)
        if spec.k % GROUP:
            padded = e.scratch_rows(rows, GROUP)
            for r in range(rows):
                e.store(padded[r], e.const(0.0, "float32", GROUP), 0, lanes=GROUP)
                for i in range(spec.k % GROUP):
                    e.store(padded[r], e.load(self.buffers["x"], row + r, whole * GROUP + i), i)
            self._group(tile, e.const(whole), padded, row, e.const(0), out)
        return out

    def _group(
        self, tile: Expr, group: Expr, x: Any, row: Expr, start: Expr, out: list[list[e.Register]]
    ) -> None:
        """Emit one group of 32 columns, all parts."""
        w, lanes, rows = self.weights, self.isa.rows, len(out)
        per_sub = w.vectors // w.reader.sub_groups
        separate = rows == 1  # scale sums, not weights
        for part in range(self.isa.parts):
            for sub in range(w.reader.sub_groups):
                scales = w.scales(tile, group, sub, part)
                zero = e.const(0.0, "float32", lanes)
                partial = [e.Register("float32", lanes, zero) for _ in w.terms if separate]
                with e.serial(sub * per_sub, (sub + 1) * per_sub) as v:
                    for j, values in enumerate(w.columns(tile, group, part, v, scales)):
                        k = start + v * w.step + j
                        if separate:
                            a = e.let(e.splat(self._x(x, row, 0, k), lanes))
                            for register, value in zip(partial, values, strict=True):
                                register.set(e.fma(a, value, register.get(), lanes))
                            continue
                        weight = w.weight(values, scales)
                        for r in range(rows):
                            a = e.splat(self._x(x, row, r, k), lanes)
                            out[r][part].set(e.fma(a, weight, out[r][part].get(), lanes))
                if separate:
                    for (scale, _), register in zip(scales, partial, strict=True):
                        total = out[0][part]
                        total.set(e.fma(register.get(), scale, total.get(), lanes))

    def _x(self, x: Any, row: Expr, r: int, k: Expr) -> Expr:
        return e.load(x[r], k) if isinstance(x, list) else e.load(x, row + r, k)
