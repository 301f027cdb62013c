"""The linear on float32 weights: what an unquantized model and ignored layers run on.

W is stored in tiles of 16 rows, [T, K, 16]: one load is 16 outputs' weights of one column, shared
by a block of up to eight rows of x, so that eight fused multiply-adds follow one weight load.
"""

from __future__ import annotations

from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.spec import LinearSpec

from .epilogue import Epilogue
from .knobs import CpuKnobs
from .rows import each_tile, row_blocks

BLOCKS = (8, 4, 2, 1)
UNROLL = 4


def from_rows(spec: LinearSpec, _isa: Isa, _knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    return 1 if spec.format == "none" else None


def emit_dense(spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows."""
    span = 2 if spec.silu_mul else 1
    with each_tile(spec, buffers, m, span) as part:
        epilogue = Epilogue(spec, buffers, isa.rows, 1.0, part.expert)

        def body(row: Expr, rows: int) -> None:
            row = e.let(row + part.first)
            tiles = [part.tile * span + s + part.base for s in range(span)]
            sums = [_product(spec, isa, buffers, tile, row, rows) for tile in tiles]
            epilogue.rows(sums, part.tile, row)

        row_blocks(part.count, knobs.blocks(BLOCKS, spec.m), body)


def _product(
    spec: LinearSpec, isa: Isa, buffers: dict[str, Any], tile: Expr, row: Expr, rows: int
) -> list[list[Expr]]:
    """Emit the loop over K for one tile; returns the sums [row][part]."""
    lanes, tile = isa.rows, e.let(tile)
    zero = e.const(0.0, "float32", lanes)
    sums = [[e.Register("float32", lanes, zero) for _ in range(isa.parts)] for _ in range(rows)]

    def column(k: Expr) -> None:
        for part in range(isa.parts):
            w = e.let(e.load(buffers["w_dense"], tile, k, part * lanes, lanes=lanes))
            for r in range(rows):
                x = e.splat(e.load(buffers["x"], row + r, k), lanes)
                sums[r][part].set(e.fma(x, w, sums[r][part].get(), lanes))

    with e.serial(0, spec.k // UNROLL) as block:
        for j in range(UNROLL):
            column(block * UNROLL + j)
    for k in range(spec.k // UNROLL * UNROLL, spec.k):
        column(e.const(k))
    return [[part.get() for part in row] for row in sums]
