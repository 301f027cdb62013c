"""The linear on int8 activations for a few rows of x: a group is decoded once for all of them.

For one tile of 16 rows and one group of 32 columns

    eight vectors of bytes and one vector of scales (panel.py) in registers
    for each row of x: int32 sums of 8 products, scaled into float32

Beside one product a weight and row there is the decode, so this pays from a few rows on; with one
row the "pn8" kernel (linear_integer.py) is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..spec import GROUP, TILE_ROWS, LinearSpec
from . import emit as e
from . import panel
from .blocks import UNIT, BlockNotes
from .emit import Expr
from .epilogue import Epilogue
from .isa_avx512 import Avx512
from .knobs import CpuKnobs
from .outliers import LOW_STEPS
from .panel import STEPS

VECTOR = 64  # bytes of a step: four columns of 16 rows


class MergedTile:
    """Code generator for one tile of 16 rows of W; the interface of ``rows.tile_pair``."""

    def __init__(
        self,
        spec: LinearSpec,
        isa: Avx512,
        knobs: CpuKnobs,
        buffers: Any,
        notes: BlockNotes | None,
        add_second_bytes: Callable[[Expr, Expr, list[list[e.Register]]], None],
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.notes = notes
        self.inline = False
        self.add_second_bytes = add_second_bytes  # of the direct kernel
        self.decoder = panel.PanelDecoder(spec, isa, buffers)
        self.offset = panel.offset(spec.fmt)
        self.epilogue = Epilogue(spec, buffers, TILE_ROWS, self.decoder.factor)

    def product(self, tile: Expr, row: Expr, rows: int) -> list[list[e.Register]]:
        """Emit the loop over K; returns float32 registers [row][part]."""
        tile, zero = e.let(tile), e.const(0.0, "float32", TILE_ROWS)
        out = [[e.Register("float32", TILE_ROWS, zero)] for _ in range(rows)]
        self.inline = self.notes is not None and rows == UNIT
        if self.inline:
            self.bytes = e.scratch(STEPS * VECTOR, "uint8")
            self.low = e.scratch(rows * TILE_ROWS, "float32")
            for r in range(rows):
                e.store(self.low, zero, r * TILE_ROWS, lanes=TILE_ROWS)
        with e.serial(0, self.spec.groups) as group:
            self.knobs.prefetch_tile(self.spec, self.buffers, tile, group)
            w_scale = self._group(tile, group, row, [r[0] for r in out])
            if self.inline:
                self._second_bytes(group, row, w_scale)
        if not self.inline:
            self.add_second_bytes(tile, row, out)
            return out
        for r, registers in enumerate(out):
            low = e.load(self.low, r * TILE_ROWS, lanes=TILE_ROWS)
            registers[0].set(registers[0].get() + low)
        return out

    def _second_bytes(self, group: Expr, row: Expr, w_scale: Expr) -> None:
        """Multiply the group's bytes, kept on the stack, with the second bytes of listed rows."""
        buffers, notes = self.buffers, self.notes
        assert notes is not None
        at = notes.place(row, group)

        with e.serial(0, e.let(e.load(notes.listed, at, 0))) as i:
            own = e.let(e.load(notes.listed, at, i + 1))
            start = e.const(0, "int32", TILE_ROWS)
            if self.offset:
                start = e.splat(e.load(buffers["sums_low"], own, group) * (-self.offset), TILE_ROWS)
            total = e.Register("int32", TILE_ROWS, start)
            for step in range(STEPS):
                weight = e.let(e.load(self.bytes, step * VECTOR, lanes=VECTOR))
                a = self.isa.activation(buffers["codes_low"], own, group * GROUP + step * 4)
                total.set(self.isa.dot(total.get(), weight, a))
            x_scale = e.load(buffers["scales"], own, group) * e.const(1 / LOW_STEPS, "float32")
            scaled = e.let(e.cast(total.get(), "float32", TILE_ROWS) * w_scale)
            at_row = e.let((own - row) * TILE_ROWS)
            low = e.load(self.low, at_row, lanes=TILE_ROWS)
            value = e.fma(scaled, e.splat(x_scale, TILE_ROWS), low, TILE_ROWS)
            e.store(self.low, value, at_row, lanes=TILE_ROWS)

    def _group(self, tile: Expr, group: Expr, row: Expr, out: list[e.Register]) -> Expr:
        """Emit a group: decode and products in turn, so that they run side by side.

        Returns the scales of its bytes.
        """
        decoder = self.decoder
        count = self.spec.tile_code_bytes // 64
        sums = self._starts(group, row, len(out))

        def at_once(transform: Any) -> None:
            for v in range(count):
                for i, weight in enumerate(decoder.vector(tile, group, v, transform)):
                    self._products(weight, v * (panel.STEPS // count) + i, group, row, sums)

        def in_turn(transform: Any) -> None:  # the same in little text
            with e.serial(0, count) as v:
                for i, weight in enumerate(decoder.vector(tile, group, v, transform)):
                    self._products(weight, v * (panel.STEPS // count) + i, group, row, sums)

        w_scale = e.let(decoder.choose(tile, group, at_once, in_turn))
        for r, total in enumerate(sums):
            x_scale = e.splat(e.load(self.buffers["scales"], row + r, group), TILE_ROWS)
            scaled = e.let(e.cast(total.get(), "float32", TILE_ROWS) * w_scale)
            out[r].set(e.fma(scaled, x_scale, out[r].get(), TILE_ROWS))
        return w_scale

    def _starts(self, group: Expr, row: Expr, rows: int) -> list[e.Register]:
        """Make the int32 sums of a group; the bytes' offset is taken off up front."""
        sums = []
        for r in range(rows):
            start = e.const(0, "int32", TILE_ROWS)
            if self.offset and self.inline and self.notes:
                start = e.let(e.splat(e.load(self.notes.starts, row + r, group), TILE_ROWS))
            elif self.offset:
                total = e.load(self.buffers["sums"], row + r, group)
                start = e.let(e.splat(total * (-self.offset), TILE_ROWS))
            sums.append(e.Register("int32", TILE_ROWS, start))
        return sums

    def _products(
        self, weight: Expr, step: Expr, group: Expr, row: Expr, sums: list[e.Register]
    ) -> None:
        """Add the products of four columns, for each row."""
        if self.inline:
            e.store(self.bytes, weight, step * VECTOR, lanes=VECTOR)
        for r, total in enumerate(sums):
            a = self.isa.activation(self.buffers["codes"], row + r, group * GROUP + step * 4)
            total.set(self.isa.dot(total.get(), weight, a))
