"""The linear on int8 activations for many rows of x, where vectors are shorter than a tile's rows.

The loops are those of panel_blocks.py, a block's part of a tile is the rows of a vector.

Terms stay apart: tables of small bytes let the sums of a whole group stay in 16 bits where the
instruction set adds products in pairs (E2M1 in half units: 8 x 2 x 12 x 128 = 24576), so that a
product costs a multiplication and an addition of 32 bytes.  Sums of four rows of x and two terms
fit sixteen registers for one group.

    panel codes   uint8   [tiles, groups, parts, 8 steps, terms, 4 * rows]
    panel scales  float32 [tiles, groups, vectors, 16]   (sub-group, term), then the offsets
"""

from __future__ import annotations

from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx2 import Avx2
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec
from relax_passes.terms import Term, common_factor

from .decoded_panel import BLOCK
from .knobs import CpuKnobs
from .panel_blocks import BlockPanel, emit_blocks
from .sums import Sum, narrow_steps
from .tile import ActivationCodes

STEPS = GROUP // 4
L1_BYTES = 16384  # of decoded codes of one vector of W's rows


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    fits = isinstance(isa, Avx2) and spec.activation.integer and not spec.experts
    if not fits or spec.format == "none" or spec.terms[0].table is None:
        return None
    return max(knobs.panel_rows, BLOCK)


def emit_panel(spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows, M being worth a panel."""
    emit_blocks(_Panel, spec, isa, knobs, buffers, m)


class _Panel(BlockPanel):
    """Tiles as bytes, the terms of W apart."""

    def allocate(self) -> None:
        """Make room for codes and scales of every term."""
        spec, isa, wide = self.spec, self.isa, self.wide
        self.reader = ScaleReader(spec.fmt, self.buffers["w_scales"])
        self.lanes = isa.rows
        self.terms: tuple[Term, ...] = isa.adapt(spec.terms)
        self.factor = common_factor(self.terms)
        self.tables = [isa.table(t.table) for t in self.terms if t.table is not None]
        self.subs, count = self.reader.sub_groups, len(self.terms)
        self.offsets = any(t.offset != 0 for t in self.terms)
        self.vectors = self.subs * count + self.offsets
        self.depth = min(spec.groups, max(1, L1_BYTES // (count * STEPS * isa.bytes)))
        shape = (wide * self.depth * isa.parts, STEPS * count, isa.bytes)
        self.codes = e.workspace(shape, "uint8")
        self.scales = e.workspace((wide * self.depth, self.vectors, TILE_ROWS), "float32")

    def decode_group(self, tile: Expr, group: Expr, at: Expr) -> None:
        """Decode the bytes and scales of one tile and group."""
        isa = self.isa
        with e.serial(0, isa.parts) as part, e.serial(0, STEPS // 2) as v:
            source = v * 64 + part * isa.bytes
            packed = self.buffers["w_codes"]
            packed = e.let(e.load(packed, tile, group, source, lanes=isa.bytes))
            for half, index in enumerate((e.let(isa.low(packed)), e.let(isa.high(packed)))):
                for t, table in enumerate(self.tables):
                    step = (v * 2 + half) * len(self.terms) + t
                    value = isa.lookup(table, index)
                    e.store(self.codes, value, at * isa.parts + part, step, 0, lanes=isa.bytes)
        self._scales(tile, group, at)

    def _scales(self, tile: Expr, group: Expr, at: Expr) -> None:
        """Decode the scales of one tile and group, and what offsets make of x's sum."""
        lanes = TILE_ROWS
        offset: Expr = None
        for sub in range(self.subs):
            for t, term in enumerate(self.terms):
                args = (tile, group, sub, 0, lanes)
                scale = self.reader.scale(term.scale, *args)
                relative = term.factor / self.factor
                if relative != 1.0:
                    scale = scale * e.const(relative, "float32", lanes)
                scale = e.let(scale)
                e.store(self.scales, scale, at, sub * len(self.terms) + t, 0, lanes=lanes)
                if term.offset == 0:
                    continue
                zero = (
                    self.reader.zero_point(term.offset, *args)
                    if isinstance(term.offset, str)
                    else e.const(float(term.offset), "float32", lanes)
                )
                part = e.let(zero * scale)
                offset = part if offset is None else e.let(offset + part)
        if offset is not None:
            e.store(self.scales, offset, at, self.vectors - 1, 0, lanes=lanes)

    def add_group(
        self,
        x: ActivationCodes,
        rows: list[Expr],
        place: Expr,
        part: Expr,
        group: Expr,
        out: Any,
    ) -> None:
        """Add one group's products to ``out``, of as many rows."""
        isa, lanes, count = self.isa, self.isa.rows, len(self.terms)
        at, steps = e.let(place * isa.parts + part), STEPS // self.subs
        totals: list[Expr] = [None] * len(rows)
        for sub in range(self.subs):
            zero = e.const(0, "int32", lanes)
            sums = [[Sum(isa, narrow_steps(isa, t), zero) for t in self.terms] for _ in rows]
            for step in range(sub * steps, (sub + 1) * steps):
                weights = [
                    isa.prepare(e.let(e.load(self.codes, at, step * count + t, 0, lanes=isa.bytes)))
                    for t in range(count)
                ]
                for row, own in zip(rows, sums, strict=True):
                    a = isa.activation(x.codes, row, group * GROUP + step * 4)
                    for one, weight in zip(own, weights, strict=True):
                        one.add(weight, a)
            for t in range(count):
                vector = sub * count + t
                scale = e.let(e.load(self.scales, place, vector, part * lanes, lanes=lanes))
                for r, own in enumerate(sums):
                    value = e.cast(own[t].get(), "float32", lanes)
                    before = totals[r]
                    more = value * scale if before is None else e.fma(value, scale, before, lanes)
                    totals[r] = e.let(more)
        for r, row in enumerate(rows):
            x_scale = e.let(e.splat(x.scale(row, group, 0), lanes))
            if self.offsets:
                offset = e.load(self.scales, place, self.vectors - 1, part * lanes, lanes=lanes)
                total = e.cast(e.const(0) - x.sum(row, group, 0), "float32")
                totals[r] = e.let(e.fma(offset, e.splat(total, lanes), totals[r], lanes))
            out[r].set(e.fma(totals[r], x_scale, out[r].get(), lanes))
