"""One tile of 16 rows of W and a few rows of x: the products of the direct kernel (direct.py)."""

from __future__ import annotations

from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.outliers import LOW_STEPS, ListedGroups, listed_groups
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec
from relax_passes.terms import Term, common_factor

from .epilogue import Epilogue
from .knobs import CpuKnobs
from .sums import Sum, narrow_steps


class ActivationCodes:
    """One array of activation codes with its scales and, where a format needs them, sums.

    ``second`` says that they are second bytes.
    """

    def __init__(self, suffix: str, buffers: Any, sub_groups: int):
        self.second = low = suffix == "_low"
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


class Tile:
    """Code generator for one tile of 16 rows of W."""

    def __init__(
        self, spec: LinearSpec, isa: Isa, knobs: CpuKnobs, buffers: Any, expert: Expr | None
    ):
        self.spec, self.isa, self.knobs, self.buffers = spec, isa, knobs, buffers
        self.terms = self._terms()
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

    def _terms(self) -> tuple[Term, ...]:
        """Choose the terms of W, each with sums of its own."""
        return self.isa.adapt(self.spec.terms)

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
            for part in range(parts):
                self._prefetch(tile, group, part)
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
            for part, register in enumerate(out):
                self._prefetch(tile, group, part)
                self._group(tile, group, part, row, self.x, [register])
            with listed.when(group):
                for part, register in enumerate(low):
                    self._group(tile, group, part, row, [second], [register])
        for register, more in zip(out, low, strict=True):
            register.set(register.get() + more.get())

    def _prefetch(self, tile: Expr, group: Expr, part: int) -> None:
        """Emit prefetches in front of a part of a group."""
        if part == 0:
            self.knobs.prefetch_tile(self.spec, self.buffers, tile, group)

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
                        scale = e.splat(self._x_scale(x, row + r, group, x_sub), lanes)
                        out[r].set(e.fma(scale, total, out[r].get(), lanes))
                        totals[r][i] = None

    def _x_scale(self, x: ActivationCodes, row: Expr, group: Expr, sub: int) -> Expr:
        """Load the scale of one sub-group of x."""
        return x.scale(row, group, sub)

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
