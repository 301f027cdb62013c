"""The linear on int8 activations for many rows of x: decode a panel of W once, then multiply.

    for each pair of row tiles, in parallel
        decode both tiles, all of K, to bytes and scales (panel.py) in a buffer that fits the L2
        the products with second bytes of x (low_bytes.py), where groups have them
        for each block of rows of x: int32 sums of 4 x 8 products a group, scaled into float32

A block of R rows and two tiles holds 2R int32 and 2R float32 vectors in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.outliers import LOW_STEPS
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

from . import group_sums, panel
from .epilogue import Epilogue
from .knobs import CpuKnobs
from .low_bytes import LowBytes, turn_lists
from .panel import Panel, Words
from .rows import equal_blocks


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    fits = isinstance(isa, Avx512) and spec.activation.integer and not spec.experts
    if not fits or spec.format == "none" or not panel.supports(spec.fmt):
        return None
    return max(knobs.panel_rows, knobs.panel_block)


def emit_panel(spec: LinearSpec, isa: Avx512, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    wide = panel_width(spec, knobs)
    times = -panel.offset(spec.fmt)
    x = Words(buffers["codes"], buffers["scales"], buffers["sums"], times)
    if times:
        x = replace(x, sums=make_starts(spec, buffers, m, times), times=1)
    x_low = rows_of_groups = None
    if spec.activation.outliers:
        low = buffers["codes_low"], buffers["scales"], buffers["sums_low"]
        x_low = Words(*low, times, 1 / LOW_STEPS)
        rows_of_groups = turn_lists(buffers["outliers"], m, spec.groups)
    with e.parallel(0, -(-spec.tiles // wide)) as block:
        decoder = panel.PanelDecoder(spec, isa, buffers)
        codes = e.workspace((wide * spec.groups, panel.STEPS, 64), "uint8")
        scales = e.workspace((wide * spec.groups, TILE_ROWS), "float32")
        first = e.let(block * wide)
        with panel_groups(spec, knobs, buffers, first, wide) as (tile, group, c):
            decoder.decode(tile, group, codes, scales, c * spec.groups + group)
        epilogue = Epilogue(spec, buffers, TILE_ROWS, decoder.factor)
        bytes_ = Panel(codes, scales)
        sums = None
        if x_low is not None:
            rest = LowBytes(spec, isa, wide, m, m)
            rest.clear()
            rest.add(x_low, rows_of_groups, bytes_)
            sums = rest.sums
        kernel = Block(spec, epilogue, wide, bytes_, x, sums)
        equal_blocks(m, knobs.panel_block, lambda row, rows: kernel.emit(first, row, rows))


def make_starts(spec: LinearSpec, buffers: Any, m: Expr, times: int) -> Any:
    """Emit int32 [M, G], what accumulators start with: every tile broadcasts it from memory."""
    starts, begin = e.workspace((m, spec.groups), "int32"), group_sums.first(spec.fmt)
    with e.parallel(0, m) as row, e.serial(0, spec.groups) as group:
        e.store(starts, e.load(buffers["sums"], row, group) * times + begin, row, group)
    return starts


def panel_width(spec: LinearSpec, knobs: CpuKnobs) -> int:
    """Choose the row tiles of a panel; silu * up needs pairs."""
    return knobs.panel_tiles if spec.tiles % knobs.panel_tiles == 0 or not spec.silu_mul else 2


@contextmanager
def panel_groups(
    spec: LinearSpec, knobs: CpuKnobs, buffers: Any, first: Expr, wide: int
) -> Iterator[tuple[Expr, Expr, Expr]]:
    """Open the loops over what a panel holds: (tile of W, group, tile of the panel)."""
    with e.serial(0, wide) as c, e.serial(0, spec.groups) as group:
        tile = first + c if spec.tiles % wide == 0 else e.clamped(first + c, spec.tiles - 1)
        tile = e.let(tile)
        knobs.prefetch_tile(spec, buffers, tile, group)
        yield tile, group, c


class Block:
    """Code generator for R rows of x and the tiles of a panel.

    ``sums`` float32 [M, tiles * 16], if any, are what the products are added to.
    """

    def __init__(
        self,
        spec: LinearSpec,
        epilogue: Epilogue,
        wide: int,
        panel: Panel,
        x: Words,
        sums: Any = None,
    ):
        self.spec, self.epilogue, self.wide = spec, epilogue, wide
        self.panel, self.x, self.sums = panel, x, sums
        self.isa = Avx512()

    def emit(self, first: Expr, row: Expr, rows: int) -> None:
        """Emit the product of a block and its epilogue."""
        row = e.let(row)
        out = [
            [e.Register("float32", TILE_ROWS, self._first(row + r, c)) for r in range(rows)]
            for c in range(self.wide)
        ]
        with e.serial(0, self.spec.groups) as group:
            self._group(group, row, out)
        self._finish(first, row, out)

    def _first(self, row: Expr, c: int) -> Expr:
        if self.sums is None:
            return e.const(0.0, "float32", TILE_ROWS)
        return e.load(self.sums, row, c * TILE_ROWS, lanes=TILE_ROWS)

    def _group(self, group: Expr, row: Expr, out: list[list[e.Register]]) -> None:
        """Add a group's products."""
        x, w, rows = self.x, self.panel, range(len(out[0]))
        at = [e.let(c * self.spec.groups + group) for c in range(self.wide)]
        acc: list[list[e.Register]] = [[] for _ in at]
        for r in rows:
            start = x.start(row + r, group)
            for registers in acc:
                registers.append(e.Register("int32", TILE_ROWS, start))
        self._products(at, group, row, acc)
        scaled = [
            group_sums.scaling(
                self.spec.fmt, e.let(e.load(w.scales, i, 0, lanes=TILE_ROWS)), w.start(i)
            )
            for i in at
        ]
        for r in rows:
            x_scale = x.scale(row + r, group)
            for c, register in enumerate(registers[r] for registers in out):
                value = scaled[c](acc[c][r].get())
                register.set(e.fma(value, x_scale, register.get(), TILE_ROWS))

    def _products(
        self, at: list[Expr], group: Expr, row: Expr, acc: list[list[e.Register]]
    ) -> None:
        """Add the products of a group to its integer sums."""
        with e.serial(0, panel.STEPS) as step:
            weights = [e.let(e.load(self.panel.codes, i, step, 0, lanes=64)) for i in at]
            for r in range(len(acc[0])):
                a = self.isa.activation(self.x.codes, row + r, group * GROUP + step * 4)
                for c, weight in enumerate(weights):
                    acc[c][r].set(self.isa.dot(acc[c][r].get(), weight, a))

    def _finish(self, first: Expr, row: Expr, out: list[list[e.Register]]) -> None:
        """Store; in a last, partly filled panel the tiles beyond W are dropped."""
        if self.spec.silu_mul:
            for c in range(0, self.wide, 2):
                pair = [[[r.get()] for r in out[c]], [[r.get()] for r in out[c + 1]]]
                self.epilogue.rows(pair, e.let((first + c) // 2), row)
            return
        for c in range(self.wide):
            tile = e.let(first + c)
            if c and self.spec.tiles % self.wide:
                with e.when(tile < self.spec.tiles), e.then():
                    self.epilogue.rows([[[r.get()] for r in out[c]]], tile, row)
            else:
                self.epilogue.rows([[[r.get()] for r in out[c]]], tile, row)
