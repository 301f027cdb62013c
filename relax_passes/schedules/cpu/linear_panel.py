"""The linear on int8 activations for many rows of x: decode a panel of W once, then multiply.

    for each pair of row tiles, in parallel
        decode both tiles, all of K, to bytes and scales (panel.py) in a buffer that fits the L2
        for each block of rows of x: int32 sums of 4 x 8 products a group, scaled into float32

A block of R rows and two tiles holds 2R int32 and 2R float32 vectors in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..spec import GROUP, OUTLIERS, TILE_ROWS, LinearSpec
from . import emit as e
from . import panel
from .emit import Expr
from .epilogue import Epilogue
from .isa_avx512 import Avx512
from .knobs import CpuKnobs
from .outliers import LOW_STEPS, listed_groups
from .rows import equal_blocks


def emit_panel(spec: LinearSpec, isa: Avx512, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    wide = panel_width(spec, knobs)
    times = -panel.offset(spec.fmt)
    x = Words(buffers["codes"], buffers["scales"], buffers["sums"], times)
    x_low = None
    if spec.activation == OUTLIERS:
        low = buffers["codes_low"], buffers["scales"], buffers["sums_low"]
        x_low = Words(*low, times, 1 / LOW_STEPS)
    with e.parallel(0, -(-spec.tiles // wide)) as block:
        decoder = panel.PanelDecoder(spec, isa, buffers)
        codes = e.workspace((wide * spec.groups, panel.STEPS, 64), "uint8")
        scales = e.workspace((wide * spec.groups, TILE_ROWS), "float32")
        first = e.let(block * wide)
        with panel_groups(spec, knobs, buffers, first, wide) as (tile, group, c):
            decoder.decode(tile, group, codes, scales, c * spec.groups + group)
        epilogue = Epilogue(spec, buffers, TILE_ROWS, decoder.factor)
        listed = buffers.get("outliers")
        kernel = Block(spec, epilogue, wide, Panel(codes, scales), x, x_low, listed)
        equal_blocks(m, knobs.panel_block, lambda row, rows: kernel.emit(first, row, rows))


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


@dataclass(frozen=True)
class Words:
    """Bytes of the activations: x = scales * factor * (codes + a constant that starts contain).

    Attributes
    ----------
    codes, scales, sums : Buffer
        int8 [M, Kp], float32 [M, G] and int32 [M, G].
    times : int
        What a sum is multiplied by to start the accumulators of its row and group.
    factor : float
        On the scales.
    """

    codes: Any
    scales: Any
    sums: Any
    times: int
    factor: float = 1.0


@dataclass(frozen=True)
class Panel:
    """Decoded row tiles: uint8 [tiles * G, 8 steps, 64], float32 [tiles * G, 16].

    ``starts`` int32 [tiles * G, 16], if any, is a further start of the accumulators.
    """

    codes: Any
    scales: Any
    starts: Any = None


class Block:
    """Code generator for R rows of x and the tiles of a panel.

    ``x`` and, in the groups that ``listed`` names for a row, ``x_low`` are what W is multiplied by.
    """

    def __init__(
        self,
        spec: LinearSpec,
        epilogue: Epilogue,
        wide: int,
        panel: Panel,
        x: Words,
        x_low: Words | None = None,
        listed: Any = None,
    ):
        self.spec, self.epilogue, self.wide = spec, epilogue, wide
        self.panel, self.x, self.x_low, self.listed = panel, x, x_low, listed
        self.isa = Avx512()

    def emit(self, first: Expr, row: Expr, rows: int) -> None:
        """Emit the product of a block and its epilogue."""
        row = e.let(row)
        out = self.start_rows(row, rows)
        with e.serial(0, self.spec.groups) as group:
            self.group(self.x, self.panel, self.places(group), group, row, out)
        self._finish(first, row, out)

    def places(self, group: Expr) -> list[Expr]:
        """Return where each tile has its bytes of a group in the panel."""
        return [e.let(c * self.spec.groups + group) for c in range(self.wide)]

    def start_rows(self, row: Expr, rows: int) -> list[list[e.Register]]:
        """Make the float32 sums [tile][row]: zero, or the products with the second bytes of x."""
        zero, tiles = e.const(0.0, "float32", TILE_ROWS), range(self.wide)
        if self.x_low is None:
            return [[e.Register("float32", TILE_ROWS, zero) for _ in range(rows)] for _ in tiles]
        kept = [e.scratch(rows * TILE_ROWS, "float32") for _ in tiles]
        with e.serial(0, rows) as r:
            own = e.let(row + r)
            out = [[e.Register("float32", TILE_ROWS, zero)] for _ in tiles]
            with listed_groups(self.listed, own) as group:
                self.group(self.x_low, self.panel, self.places(group), group, own, out)
            for c in tiles:
                e.store(kept[c], out[c][0].get(), r * TILE_ROWS, lanes=TILE_ROWS)
        return [
            [
                e.Register("float32", TILE_ROWS, e.load(k, r * TILE_ROWS, lanes=TILE_ROWS))
                for r in range(rows)
            ]
            for k in kept
        ]

    def group(
        self,
        x: Words,
        w: Panel,
        at: list[Expr],
        group: Expr,
        row: Expr,
        out: list[list[e.Register]],
    ) -> None:
        """Add a group's products to the sums of some tiles, ``at`` their places in the panel."""
        rows, tiles = range(len(out[0])), range(len(at))
        acc: list[list[e.Register]] = [[] for _ in at]
        starts = None
        if w.starts is not None:
            starts = [e.let(e.load(w.starts, i, 0, lanes=TILE_ROWS)) for i in at]
        for r in rows:
            start = self._start(x, row + r, group)
            for c in tiles:
                own = start + starts[c] if starts else start
                acc[c].append(e.Register("int32", TILE_ROWS, own))
        self._products(x.codes, w.codes, at, group, row, acc)
        w_scales = [e.let(e.load(w.scales, i, 0, lanes=TILE_ROWS)) for i in at]
        for r in rows:
            x_scale = e.load(x.scales, row + r, group)
            if x.factor != 1.0:
                x_scale = x_scale * e.const(x.factor, "float32")
            x_scale = e.let(e.splat(x_scale, TILE_ROWS))
            for c in tiles:
                value = e.cast(acc[c][r].get(), "float32", TILE_ROWS)
                register = out[c][r]
                scaled = e.let(value * w_scales[c])
                register.set(e.fma(scaled, x_scale, register.get(), TILE_ROWS))

    def _start(self, x: Words, row: Expr, group: Expr) -> Expr:
        """Return what the offsets of W (and of x) add to a row's sum, to be taken off up front."""
        if not x.times:
            return e.const(0, "int32", TILE_ROWS)
        total = e.load(x.sums, row, group)
        return e.let(e.splat(total if x.times == 1 else total * x.times, TILE_ROWS))

    def _products(
        self,
        x: Any,
        w: Any,
        at: list[Expr],
        group: Expr,
        row: Expr,
        acc: list[list[e.Register]],
    ) -> None:
        """Add the products of one array of codes over a group."""
        with e.serial(0, panel.STEPS) as step:
            weights = [e.let(e.load(w, i, step, 0, lanes=64)) for i in at]
            for r in range(len(acc[0])):
                a = self.isa.activation(x, row + r, group * GROUP + step * 4)
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
