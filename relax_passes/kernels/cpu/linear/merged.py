"""The linear on int8 activations for a few rows of x: a group is decoded once for all of them.

For one tile of 16 rows and one group of 32 columns

    eight vectors of bytes and one vector of scales (panel.py) in registers
    for each row of x: int32 sums of 8 products, scaled into float32

Beside one product a weight and row there is the decode, so this pays from a few rows on; with one
row the "pn8" kernel (direct.py) is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.outliers import LOW_STEPS
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

from . import merge, panel
from .block_notes import UNIT, BlockNotes
from .epilogue import Epilogue
from .group_sums import first, scaling
from .knobs import CpuKnobs
from .panel import STEPS

VECTOR = 64  # bytes of a step: four columns of 16 rows


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows of a block from which on this is the direct kernel's tile."""
    fits = isinstance(isa, Avx512) and spec.activation.integer and panel.supports(spec.fmt)
    return knobs.merge_rows if fits else None


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
        expert: Expr | None,
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.notes = notes
        self.inline = False
        self.add_second_bytes = add_second_bytes  # of the direct kernel
        self.decoder = panel.PanelDecoder(spec, isa, buffers)
        self.offset = panel.offset(spec.fmt)
        self.epilogue = Epilogue(spec, buffers, TILE_ROWS, self.decoder.factor, expert)

    def product(self, tile: Expr, row: Expr, rows: int) -> list[list[e.Register]]:
        """Emit the loop over K; returns float32 registers [row][part]."""
        tile, zero = e.let(tile), e.const(0.0, "float32", TILE_ROWS)
        out = [e.Register("float32", TILE_ROWS, zero) for _ in range(rows)]
        self.inline = self.notes is not None and rows == UNIT
        if self.inline:
            self.low = e.scratch(rows * TILE_ROWS, "float32")
            for r in range(rows):
                e.store(self.low, zero, r * TILE_ROWS, lanes=TILE_ROWS)
        ahead = self.decoder.look_ahead(tile, e.const(0), None)
        # Bytes come twice as fast as codes: fetched into the first cache, they hold up the products
        # of eight rows (142 cycles a group against 98); fewer rows wait for memory either way.
        level = 2 if self.decoder.eight_bit and rows == UNIT else 1
        with e.serial(0, self.spec.groups) as group:
            self.knobs.prefetch_tile(self.spec, self.buffers, tile, group, level)
            self._group(tile, group, row, out, ahead)
        parts = [[register] for register in out]
        if not self.inline:
            self.add_second_bytes(tile, row, parts)
            return parts
        for r, register in enumerate(out):
            low = e.load(self.low, r * TILE_ROWS, lanes=TILE_ROWS)
            register.set(register.get() + low)
        return parts

    def _second_bytes(self, tile: Expr, group: Expr, row: Expr, ahead: merge.Ahead | None) -> None:
        """Multiply a group once more with the second bytes of the rows listed for it."""
        buffers, notes = self.buffers, self.notes
        assert notes is not None
        listed = e.let(e.cast(e.load(notes.listed, notes.place(row, group)), "int32"))
        with e.when(e.unlikely(listed) != 0), e.then():
            codes, w_scale = self._decoded(tile, group, ahead)
            with notes.rows(listed) as r:
                own = e.let(row + r)
                total = e.load(buffers["sums_low"], own, group) if self.offset else e.const(0)
                begins = e.splat(total * (-self.offset), TILE_ROWS), e.const(0, "int32", TILE_ROWS)
                chains = [e.Register("int32", TILE_ROWS, begin) for begin in begins]
                for step in range(STEPS):
                    weight = e.let(e.load(codes, step * VECTOR, lanes=VECTOR))
                    a = self.isa.activation(buffers["codes_low"], own, group * GROUP + step * 4)
                    total = chains[step % 2]
                    total.set(self.isa.dot(total.get(), weight, a))
                both = e.let(chains[0].get() + chains[1].get())
                x_scale = e.load(buffers["scales"], own, group) * e.const(1 / LOW_STEPS, "float32")
                scaled = e.let(e.cast(both, "float32", TILE_ROWS) * w_scale)
                low = e.load(self.low, r * TILE_ROWS, lanes=TILE_ROWS)
                value = e.fma(scaled, e.splat(x_scale, TILE_ROWS), low, TILE_ROWS)
                e.store(self.low, value, r * TILE_ROWS, lanes=TILE_ROWS)

    def _decoded(self, tile: Expr, group: Expr, ahead: merge.Ahead | None) -> tuple[Any, Expr]:
        """Decode a group to the stack; returns its bytes and their scales.

        Every tenth group or so needs it: keeping the bytes of all would cost the products more.
        """
        codes = e.scratch(STEPS * VECTOR, "uint8")

        def keep(transform: Any) -> None:
            for step, weight in self._weights(tile, group, transform):
                e.store(codes, weight, step * VECTOR, lanes=VECTOR)

        return codes, e.let(self.decoder.choose(tile, group, keep, keep, ahead))

    def _weights(self, tile: Expr, group: Expr, transform: Any) -> Iterator[tuple[int, Expr]]:
        """Decode the vectors of a group one after the other: (step, bytes)."""
        count = self.spec.tile_code_bytes // 64
        for v in range(count):
            decoded = self.decoder.vector(tile, group, v, transform)
            yield from enumerate(decoded, v * (STEPS // count))

    def _group(
        self,
        tile: Expr,
        group: Expr,
        row: Expr,
        out: list[e.Register],
        ahead: merge.Ahead | None,
    ) -> None:
        """Emit a group: decode and products in turn, so that they run side by side."""
        decoder = self.decoder
        count = self.spec.tile_code_bytes // 64
        sums = self._starts(group, row, len(out))

        def at_once(transform: Any) -> None:
            for step, weight in self._weights(tile, group, transform):
                self._products(weight, step, group, row, sums)

        def in_turn(transform: Any) -> None:  # the same in little text
            with e.serial(0, count) as v:
                for i, weight in enumerate(decoder.vector(tile, group, v, transform)):
                    self._products(weight, v * (STEPS // count) + i, group, row, sums)

        scaled = scaling(self.spec.fmt, e.let(decoder.choose(tile, group, at_once, in_turn, ahead)))
        if self.inline:
            self._second_bytes(tile, group, row, ahead)
        decoder.look_ahead(tile, e.let(e.clamped(group + 1, self.spec.groups - 1)), ahead)
        for r, total in enumerate(sums):
            x_scale = e.splat(e.load(self.buffers["scales"], row + r, group), TILE_ROWS)
            out[r].set(e.fma(scaled(total.get()), x_scale, out[r].get(), TILE_ROWS))

    def _starts(self, group: Expr, row: Expr, rows: int) -> list[e.Register]:
        """Make the int32 sums of a group; the bytes' offset is taken off up front."""
        sums, begin = [], first(self.spec.fmt)
        for r in range(rows):
            start = e.const(begin, "int32", TILE_ROWS)
            if self.offset and self.inline and self.notes:
                start = e.let(e.splat(e.load(self.notes.starts, row + r, group), TILE_ROWS))
            elif self.offset:
                total = e.load(self.buffers["sums"], row + r, group)
                start = e.let(e.splat(total * (-self.offset) + begin, TILE_ROWS))
            sums.append(e.Register("int32", TILE_ROWS, start))
        return sums

    def _products(
        self, weight: Expr, step: Expr, group: Expr, row: Expr, sums: list[e.Register]
    ) -> None:
        """Add the products of four columns, for each row."""
        for r, total in enumerate(sums):
            a = self.isa.activation(self.buffers["codes"], row + r, group * GROUP + step * 4)
            total.set(self.isa.dot(total.get(), weight, a))
