"""The linear on integer activations: integer products a group, float32 sums over groups.

For one tile of 16 rows and one group of 32 columns (the "pn8" kernel):

    for each packed vector v (columns 8v..8v+3 in low nibbles, 8v+4..8v+7 in high ones)
        bytes = table lookup;  lane r of the int32 accumulator += four bytes . four activations
    y[r] += x_scale * sum over terms of  sign * w_scale[r] * (accumulator[r] - offset * x_sum)

Weights are unsigned bytes, activations signed, so vpdpbusd needs no bias and no sign trick.  A
group's four activations are one 32-bit broadcast; a row of W is one lane: no horizontal sums.
M > 1 runs the same text on blocks of rows of x, so that decoded bytes are used several times.
Sums are in 16 bits where an instruction set has it so and they hold a group (sums.py).

Activations in four bits (W4A4) are several arrays of small integers, for AMXFP4 the values of
either sign: two terms of W times two of x are four accumulators of small-integer products.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.outliers import LOW_STEPS, ListedGroups, listed_groups
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec
from relax_passes.terms import Term, common_factor

from . import merged, merged_words, panel
from .block_notes import MOST_ROWS, UNIT, BlockNotes
from .by_group import PAIRS, GroupQuantizer
from .epilogue import Epilogue
from .knobs import CpuKnobs
from .merged import MergedTile
from .merged_words import WordsTile
from .rows import Part, each_tile, row_blocks, tile_group, tile_pair
from .sums import Sum, narrow_steps, scope
from .x_words import XWords

ACCUMULATORS = 16  # int32 vectors that a block of rows may keep in registers


def from_rows(spec: LinearSpec, _isa: Isa, _knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel."""
    return None if spec.activation.exact else 1


def emit_direct(spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows."""
    notes = block_notes(spec, isa, knobs, buffers)
    if notes is not None:
        if spec.m:
            notes.make(m)
        else:
            with e.when(m >= notes.unit), e.then():
                notes.make(m)
    Direct(spec, isa, knobs, buffers, m, notes).tiles()


class Direct:
    """The kernel that decodes a tile again for every block of rows of x.

    ``notes`` are what larger blocks of rows need, made before ``tiles`` emits the parallel loop;
    ``quantizer`` takes groups of the result instead of y.
    """

    def __init__(
        self,
        spec: LinearSpec,
        isa: Isa,
        knobs: CpuKnobs,
        buffers: Any,
        m: Expr,
        notes: BlockNotes | XWords | None,
        quantizer: GroupQuantizer | None = None,
    ):
        self.spec, self.isa, self.knobs, self.buffers, self.m = spec, isa, knobs, buffers, m
        self.notes, self.quantizer = notes, quantizer
        kind = merged_words if isinstance(notes, XWords) else merged
        self.merge_rows = kind.from_rows(spec, isa, knobs)

    def tiles(self) -> None:
        """Emit the parallel loop."""
        span = 2 if self.spec.silu_mul else 1
        if self.quantizer is not None:
            span *= PAIRS
        words = self.isa.words_scope() if isinstance(self.notes, XWords) else nullcontext()
        with scope(self.isa, self.spec), words:
            with each_tile(self.spec, self.buffers, self.m, span) as part:
                self._tile(part)

    def _tile(self, part: Part) -> None:
        spec, isa, knobs, buffers = self.spec, self.isa, self.knobs, self.buffers
        kernel = _Tile(spec, isa, knobs, buffers, part.expert)
        most = max(1, ACCUMULATORS // (len(kernel.terms) * len(kernel.x)))
        sizes = [s for s in isa.block if s <= most] or [1]
        merging: MergedTile | WordsTile | None = None
        if isinstance(self.notes, XWords):
            merging = WordsTile(spec, isa, knobs, buffers, self.notes)
            sizes = [merged_words.BLOCK, *sizes]
        elif self.merge_rows is not None:
            assert isinstance(isa, Avx512)
            second = kernel.add_second_bytes
            merging = MergedTile(spec, isa, knobs, buffers, self.notes, second, part.expert)
            sizes = list(isa.block)

        def body(row: Expr, rows: int) -> None:
            merges = self.merge_rows is not None and rows >= self.merge_rows
            one = merging if merges else kernel
            row = e.let(row + part.first)
            if self.quantizer is None:
                tile_pair(spec, one, part, row, rows)
            else:
                tile_group(spec, one, part, row, rows, self.quantizer)

        row_blocks(part.count, knobs.blocks(sizes, spec.m), body)


def block_notes(
    spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any
) -> BlockNotes | XWords | None:
    """Make room for what blocks of several rows need; None where it does not pay.

    Eight-bit weights are their own bytes: a pass of its own for second bytes costs little there.
    """
    most = spec.m or spec.m_max or max(knobs.panel_rows, knobs.panel_block)
    if (rows := merged_words.from_rows(spec, isa, knobs)) is not None:
        return XWords(spec, buffers, most, rows) if rows <= most <= MOST_ROWS else None
    eight_bit = spec.fmt.terms[0].table is None
    pays = spec.activation.outliers and not eight_bit and not spec.experts
    if merged.from_rows(spec, isa, knobs) is None or not pays or not UNIT <= most <= MOST_ROWS:
        return None
    return BlockNotes(spec, buffers, most, panel.offset(spec.fmt))


class ActivationCodes:
    """One array of activation codes with its scales and, where a format needs them, sums."""

    def __init__(self, suffix: str, buffers: Any, sub_groups: int):
        low = suffix == "_low"
        self.codes, self.sums = buffers[f"codes{suffix}"], buffers.get(f"sums{suffix}")
        self.scales = buffers["scales" if low else f"scales{suffix}"]
        self.factor = 1 / LOW_STEPS if low else 1.0
        self.sub_groups = sub_groups

    def scale(self, row: Expr, group: Expr, sub: int) -> Expr:
        """Load the scale of one sub-group."""
        value = e.load(self.scales, row, group * self.sub_groups + sub)
        return e.let(value if self.factor == 1.0 else value * e.const(self.factor, "float32"))

    def sum(self, row: Expr, group: Expr, sub: int) -> Expr:
        """Load the sum of the codes of one sub-group."""
        return e.let(e.load(self.sums, row, group * self.sub_groups + sub))


class _Tile:
    """Code generator for one tile of 16 rows of W."""

    def __init__(
        self, spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, expert: Expr | None
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.terms = isa.adapt(spec.terms)
        self.reader = ScaleReader(spec.fmt, buffers["w_scales"])
        self.factor = common_factor(self.terms)
        self.tables = [None if t.table is None else isa.table(t.table) for t in self.terms]
        self.eight_bit = self.terms[0].table is None
        self.epilogue = Epilogue(spec, buffers, isa.rows, self.factor, expert)
        names = [name for name, _, _ in spec.activation_buffers() if name.startswith("codes")]
        per_group = GROUP // spec.activation.group
        arrays = {n: ActivationCodes(n.removeprefix("codes"), buffers, per_group) for n in names}
        self.low = arrays.pop("codes_low", None)
        self.x = list(arrays.values())
        self.sub_groups = max(per_group, self.reader.sub_groups)

    def product(self, tile: Expr, row: Expr, rows: int) -> list[list[e.Register]]:
        """Emit the loop over K; returns float32 registers [row][part]."""
        lanes, parts = self.isa.rows, self.isa.parts
        zero = e.const(0.0, "float32", lanes)
        tile = e.let(tile)
        out = [[e.Register("float32", lanes, zero) for _ in range(parts)] for _ in range(rows)]
        if rows == 1 and self.low is not None:
            self._one_row(tile, row, out[0], self.low)
            return out
        with e.serial(0, self.spec.groups) as group:
            self.knobs.prefetch_tile(self.spec, self.buffers, tile, group)
            for part in range(parts):
                self._group(tile, group, part, row, self.x, [r[part] for r in out])
        self.add_second_bytes(tile, row, out)
        return out

    def _one_row(
        self, tile: Expr, row: Expr, out: list[e.Register], second: ActivationCodes
    ) -> None:
        """Emit the loop over K for one row, each group with its second bytes where it is listed.

        Memory bounds it, so it waits for nothing else: a pass of its own for second bytes would
        ask for no weights meanwhile (1B shape's down projection: 25.8 GB/s where others read 32).
        """
        lanes = self.isa.rows
        low = [e.Register("float32", lanes, e.const(0.0, "float32", lanes)) for _ in out]
        listed = ListedGroups(self.buffers["outliers"], row)
        with e.serial(0, self.spec.groups) as group:
            self.knobs.prefetch_tile(self.spec, self.buffers, tile, group)
            for part, register in enumerate(out):
                self._group(tile, group, part, row, self.x, [register])
            with listed.when(group):
                for part, register in enumerate(low):
                    self._group(tile, group, part, row, [second], [register])
        for register, more in zip(out, low, strict=True):
            register.set(register.get() + more.get())

    def add_second_bytes(self, tile: Expr, row: Expr, out: list[list[e.Register]]) -> None:
        """Add the products with second bytes to the float32 sums [row][part] of a block.

        Rows go one by one, each over the groups that it lists; behind the loop over all groups,
        which has brought the tile into the cache.
        """
        if self.low is None:
            return
        lanes, rows = self.isa.rows, len(out)
        kept = e.scratch(rows * TILE_ROWS, "float32")
        for r, registers in enumerate(out):
            for p, register in enumerate(registers):
                e.store(kept, register.get(), r * TILE_ROWS + p * lanes, lanes=lanes)
        with e.serial(0, rows) as r:
            own = e.let(row + r)
            at = [r * TILE_ROWS + p * lanes for p in range(self.isa.parts)]
            sums = [e.Register("float32", lanes, e.load(kept, i, lanes=lanes)) for i in at]
            with listed_groups(self.buffers["outliers"], own) as group:
                for part, register in enumerate(sums):
                    self._group(tile, group, part, own, [self.low], [register])
            for i, register in zip(at, sums, strict=True):
                e.store(kept, register.get(), i, lanes=lanes)
        for r, registers in enumerate(out):
            for p, register in enumerate(registers):
                register.set(e.load(kept, r * TILE_ROWS + p * lanes, lanes=lanes))

    def _group(
        self,
        tile: Expr,
        group: Expr,
        part: int,
        row: Expr,
        xs: list[ActivationCodes],
        out: list[e.Register],
    ) -> None:
        """Emit one group of 32 columns for the rows of one vector part."""
        rows, lanes = len(out), self.isa.rows
        totals: list[list[Expr | None]] = [[None] * len(xs) for _ in range(rows)]
        for sub in range(self.sub_groups):
            x_sub = sub * xs[0].sub_groups // self.sub_groups
            sums = self._sums(row, rows, group, x_sub, xs)
            acc = self._products(tile, group, part, row, sub, xs, sums)
            weights = self._weights(
                tile, group, sub * self.reader.sub_groups // self.sub_groups, part
            )
            last = (sub + 1) * xs[0].sub_groups % self.sub_groups == 0  # of this x scale
            for r in range(rows):
                for i, x in enumerate(xs):
                    values = [a.get() for a in acc[r][i]]
                    total = self._combine(values, weights, sums[r][i], totals[r][i])
                    totals[r][i] = total
                    if last:
                        scale = e.splat(x.scale(row + r, group, x_sub), lanes)
                        out[r].set(e.fma(scale, total, out[r].get(), lanes))
                        totals[r][i] = None

    def _sums(
        self, row: Expr, rows: int, group: Expr, sub: int, xs: list[ActivationCodes]
    ) -> list[list[Expr | None]]:
        """Load the sums of activation codes that offsets need, [row][array of x]."""
        needed = any(t.offset != 0 for t in self.terms)
        return [[x.sum(row + r, group, sub) if needed else None for x in xs] for r in range(rows)]

    def _products(
        self,
        tile: Expr,
        group: Expr,
        part: int,
        row: Expr,
        sub: int,
        xs: list[ActivationCodes],
        sums: list[list[Expr | None]],
    ) -> list[list[list[Sum]]]:
        """Emit the integer products of a sub-group: [row][array of x][term of W]."""
        isa = self.isa
        per_sub = self.spec.tile_code_bytes // 64 // self.sub_groups
        steps = GROUP // 4 // self.sub_groups
        most = [n if (n := narrow_steps(isa, t)) >= steps else 0 for t in self.terms]
        acc = [
            [
                [
                    Sum(isa, n, self._start(t, s), t.table is None)
                    for t, n in zip(self.terms, most, strict=True)
                ]
                for s in row_sums
            ]
            for row_sums in sums
        ]
        with e.serial(sub * per_sub, (sub + 1) * per_sub) as v:
            at = v * 64 + part * isa.bytes
            packed = e.let(e.load(self.buffers["w_codes"], tile, group, at, lanes=isa.bytes))
            for half, decoded in enumerate(self._decode(packed)):
                column = group * GROUP + (v * 4 if self.eight_bit else v * 8 + 4 * half)
                prepared = [isa.prepare(w) for w in decoded]
                for r, arrays in enumerate(acc):
                    for x, own in zip(xs, arrays, strict=True):
                        a = isa.activation(x.codes, row + r, column)
                        for one, w in zip(own, prepared, strict=True):
                            one.add(w, a)
        return acc

    def _start(self, term: Term, total: Expr) -> Expr:
        """Return the initial accumulator: a constant offset is subtracted up front, in integers."""
        if isinstance(term.offset, int) and term.offset:
            return e.let(e.splat(total * (-term.offset), self.isa.rows))
        return e.const(0, "int32", self.isa.rows)

    def _decode(self, packed: Expr) -> list[list[Expr]]:
        """Decode a packed vector: [half][term] byte vectors."""
        if self.eight_bit:
            return [[self.isa.eight_bit(packed)]]
        isa = self.isa
        return [
            [e.let(isa.lookup(t, index)) for t in self.tables]
            for index in (e.let(isa.low(packed)), e.let(isa.high(packed)))
        ]

    def _weights(self, tile: Expr, group: Expr, sub: int, part: int) -> dict[str, Expr]:
        """Load the scales and zero points that the terms name, once each."""
        lanes, values = self.isa.rows, {}
        for t in self.terms:
            if t.scale not in values:
                args = (tile, group, sub, part * lanes, lanes)
                values[t.scale] = e.let(self.reader.scale(t.scale, *args))
            if isinstance(t.offset, str) and t.offset not in values:
                values[t.offset] = e.let(
                    self.reader.zero_point(t.offset, tile, group, sub, part * lanes, lanes)
                )
        return values

    def _combine(
        self, acc: list[Expr], weights: dict[str, Expr], x_sum: Expr | None, total: Expr | None
    ) -> Expr:
        """Turn the integer sums of a (sub-)group into float32, scaled by the weights' scales."""
        lanes = self.isa.rows
        for t, value in zip(self.terms, acc, strict=True):
            value = e.cast(value, "float32", lanes)
            if isinstance(t.offset, str):
                minus = e.splat(e.cast(e.const(0) - x_sum, "float32"), lanes)
                value = e.fma(weights[t.offset], minus, value, lanes)
            relative = t.factor / self.factor
            scale = weights[t.scale]
            if relative == -1.0:
                value, relative = e.const(0.0, "float32", lanes) - value, 1.0
            if relative != 1.0:
                scale = scale * e.const(relative, "float32", lanes)
            product = value * scale if total is None else e.fma(value, scale, total, lanes)
            total = e.let(product)
        return total
