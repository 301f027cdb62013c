"""Tiles of four-bit W as unsigned bytes without any rounding, for W4A4.

Merged scales (merge.py) are exact where the exponents of a row's two scales differ by at most one,
or by two with an even mantissa on the small side.  Where another row occurs in a tile and group,
rows whose exponents differ by two or more are split:

    codes      84 + big * m          small codes 0       unit 2^e_big
    codes_low  small * m             0..84, no offset    unit 2^e_small, of the other sign

    panel      codes, scales as in panel.py
    starts     int32 [tiles, G, 16]  x_offset * sum of a row's bytes less their offset
    *_low      the same of codes_low, set only where a tile and group has it
    flags      int32 [tiles * G]     1 where it has
    listed     int32 [tiles * 16, 1 + G]  how many groups of a row are split, then their numbers

With both sides' scales drawn from normal weights one row and group in 150 has to be split, one tile
and group in 9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

from . import merge, panel
from .panel import Panel


class ExactMerge(merge.Merge):
    """The scales of one tile and group; ``rare`` where one byte does not hold every row."""

    def find_rare(self) -> Expr:
        """Return int32 of 16 rows, not 0 where ``near_pair`` does not hold or rounds."""
        c = self._c
        flags = super().find_rare()
        if self.mantissa_bits:
            small = self.pick(self.d >> c(31), *self.stored)
            apart = tirx.max(self.d, c(0) - self.d)
            flags = flags | (small & tirx.Select(apart == c(2), c(1), c(0)))
        return flags

    def split_pair(self) -> tuple[Callable[[Expr], Expr], Callable[[Expr], Expr], Expr, Expr]:
        """Return codes -> bytes, codes -> low bytes, the low bytes' scales and their mantissas.

        The mantissas are int32 of 16 rows, all 0 where no row has low bytes.
        """
        c = self._c
        (mp, ep), (mn, en) = (self._parts(i) for i in (0, 1))
        flip = e.let((ep - en) >> c(31))  # all ones where the negative side is the big one
        high, least = e.let(tirx.max(ep, en)), e.let(tirx.min(ep, en))
        far = e.let((c(1) - (high - least)) >> c(31))  # all ones where they differ by two or more
        apart = e.let((high - least) & (far ^ c(-1)))
        small = e.let(self.pick(flip, mp, mn))
        sign = c(-(2**31))
        unit, low_unit = (tirx.max(x + c(127 - self.bias), c(0)) for x in (high - apart, least))
        self._scale.set(e.bits((unit << c(23)) | (flip & sign), "float32", 16))
        low_scale = e.bits((low_unit << c(23)) | ((flip ^ c(-1)) & sign), "float32", 16)
        base = e.const(merge.OFFSET * 0x0101, "uint16", 32)
        big_times = self._twice(self.pick(flip, mn, mp) << apart)
        small_times = self._twice(small & (far ^ c(-1)))
        mantissas = e.let(small & far)
        low_times = self._twice(mantissas)

        def sides(codes: Expr) -> tuple[Expr, Expr]:
            p, n = (e.let(e.bits(self.isa.lookup(t, codes), "int32", 16)) for t in self.tables[:2])
            big, small = self.pick(flip, n, p), self.pick(flip, p, n)
            return self._words(big), self._words(small)

        def transform(codes: Expr) -> Expr:
            big, small = sides(codes)
            return e.bits(base + big * big_times - small * small_times, "uint8", 64)

        def low_transform(codes: Expr) -> Expr:
            return e.bits(sides(codes)[1] * low_times, "uint8", 64)

        return transform, low_transform, e.let(low_scale), mantissas


class ExactPanel:
    """The panel of one thread and the decoder that fills it.

    Attributes
    ----------
    bytes, low : Panel
        The bytes; ``low`` is None for formats of one term, whose bytes are always exact.
    flags, listed : Buffer
        Where ``low`` is set.
    """

    def __init__(self, spec: LinearSpec, isa: Avx512, buffers: Any, wide: int, x_offset: int):
        self.spec, self.isa, self.x_offset = spec, isa, x_offset
        self.decoder = panel.PanelDecoder(spec, isa, buffers)
        self.offset = panel.offset(spec.fmt)
        self.bytes = self._allocate(wide * spec.groups)
        self.low = None
        if len(spec.fmt.terms) == 2:
            self.low = self._allocate(wide * spec.groups)
            self.flags = e.workspace((wide * spec.groups,), "int32")
            self.listed = e.workspace((wide * TILE_ROWS, 1 + spec.groups), "int32")
            with e.serial(0, wide * TILE_ROWS) as row:
                e.store(self.listed, e.const(0), row, 0)

    def _allocate(self, count: int) -> Panel:
        codes = e.workspace((count, panel.STEPS, 64), "uint8")
        scales = e.workspace((count, TILE_ROWS), "float32")
        starts = e.workspace((count, TILE_ROWS), "int32") if self.x_offset else None
        return Panel(codes, scales, starts)

    def decode(self, tile: Expr, group: Expr, c: Expr) -> None:
        """Decode a group of tile ``tile`` to tile ``c`` of the panel."""
        at = e.let(c * self.spec.groups + group)
        if self.low is None:
            transform, scale = self.decoder.single(tile, group)
            self._fill(self.bytes, tile, group, at, transform, scale, self.offset)
            return
        decoder = self.decoder
        scales = ExactMerge(self.spec.fmt, decoder.reader, self.isa, decoder.tables, tile, group)
        e.store(self.flags, e.const(0), at)
        with e.when(scales.rare != 0):
            with e.then():
                transform, low_transform, low_scale, mantissas = scales.split_pair()
                self._fill(self.bytes, tile, group, at, transform, scales.scale, self.offset)
                any_low = e.let(e.llvm("int32", "llvm.vector.reduce.or", mantissas))
                with e.when(any_low != 0), e.then():
                    self._fill(self.low, tile, group, at, low_transform, low_scale, 0)
                    e.store(self.flags, e.const(1), at)
                    self._list(mantissas, group, c)
            with e.otherwise():
                transform = scales.near_pair()
                self._fill(self.bytes, tile, group, at, transform, scales.scale, self.offset)

    def _list(self, mantissas: Expr, group: Expr, c: Expr) -> None:
        """Append a group to the lists of the rows whose small side has a mantissa."""
        kept = e.scratch(TILE_ROWS, "int32")
        e.store(kept, mantissas, 0, lanes=TILE_ROWS)
        with e.serial(0, TILE_ROWS) as r, e.when(e.load(kept, r) != 0), e.then():
            row = e.let(c * TILE_ROWS + r)
            count = e.let(e.load(self.listed, row, 0) + 1)
            e.store(self.listed, count, row, 0)
            e.store(self.listed, group, row, count)

    def _fill(
        self, to: Panel, tile: Expr, group: Expr, at: Expr, transform: Any, scale: Expr, offset: int
    ) -> None:
        """Store a group's bytes, their scales and starts."""
        count = self.spec.tile_code_bytes // 64
        first = e.const(-offset * GROUP * self.x_offset, "int32", TILE_ROWS)
        total = e.Register("int32", TILE_ROWS, first)
        times = e.const(self.x_offset, "int8", 64)
        with e.serial(0, count) as v:
            for i, value in enumerate(self.decoder.vector(tile, group, v, transform)):
                e.store(to.codes, value, at, v * (panel.STEPS // count) + i, 0, lanes=64)
                if to.starts is not None:
                    total.set(self.isa.dot(total.get(), value, times))
        e.store(to.scales, scale, at, 0, lanes=TILE_ROWS)
        if to.starts is not None:
            e.store(to.starts, total.get(), at, 0, lanes=TILE_ROWS)
