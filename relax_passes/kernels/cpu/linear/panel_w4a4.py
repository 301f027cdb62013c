"""W4A4 for many rows of x: both operands become bytes exactly, then vpdpbusd as with int8.

    x bytes and their starts                       made once (w4a4_activations.py)
    for each panel of row tiles, in parallel
        W bytes and their starts                   (w4a4_weights.py)
        for each block of rows of x                as with int8 activations (panel_int8.py)

With W = scale * (w - a) and x = unit * (v + b) for unsigned bytes w and signed ones v

    sum (w - a)(v + b) = sum w v  - a sum v  + b sum (w - a)

so that the offsets cost one addition a row of x, tile and group: the first start is a number of
the row of x, the second a vector of the tile.  The sums are integers below 2^24 and scales powers
of two (or a format's only scale), so nothing is rounded before the float32 sums over groups.

Where one byte does not hold a group there are low bytes, of single rows of x and of W in it; what
they add is where the sums begin (w4a4_rest.py).
"""

from __future__ import annotations

from typing import Any

from relax_passes.activation import Scheme
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu import fp4_integers
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.spec import TILE_ROWS, LinearSpec

from . import panel
from .epilogue import Epilogue
from .knobs import CpuKnobs
from .panel_int8 import Block, panel_groups, panel_width
from .rows import equal_blocks
from .w4a4_activations import ExactActivations
from .w4a4_rest import Rest
from .w4a4_weights import ExactPanel


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel: both operands are exact bytes."""
    x, wide = spec.activation, isinstance(isa, Avx512)
    if not wide or x.scheme is not Scheme.FOUR_BIT or spec.experts or not panel.supports(spec.fmt):
        return None
    return max(knobs.panel_rows, knobs.panel_block) if fp4_integers.supports(x.fmt) else None


def emit_w4a4(spec: LinearSpec, isa: Avx512, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    wide, blocks = panel_width(spec, knobs), e.let((m + e.const(15)) >> e.const(4))
    split = len(spec.fmt.terms) == 2  # W may have low bytes
    x = ExactActivations(spec, buffers, m, blocks, panel.offset(spec.fmt), split)
    x.emit()
    with e.parallel(0, -(-spec.tiles // wide)) as block:
        w = ExactPanel(spec, isa, buffers, wide, x.offset)
        first = e.let(block * wide)
        with panel_groups(spec, knobs, buffers, first, wide) as (tile, group, c):
            w.decode(tile, group, c)
        sums = None
        if split or x.low is not None:
            rest = Rest(spec, isa, wide, x, w, m, blocks)
            rest.emit()
            sums = rest.sums
        epilogue = Epilogue(spec, buffers, TILE_ROWS, w.decoder.factor)
        kernel = Block(spec, epilogue, wide, w.bytes, x.words, sums)
        equal_blocks(m, knobs.panel_block, lambda row, rows: kernel.emit(first, row, rows))
