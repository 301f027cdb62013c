"""Tiles of W as unsigned bytes with one offset and one scale a group, for several rows of x.

The pn8 kernel pays two products a weight for AMXFP4, one a sign.  For a block of rows of x it is
cheaper to merge the two scales first (merge.py): one vpdpbusd a weight is left, and the offset
times the sum of the activations is the accumulator's start.  One-term formats need no such trick:
their table is the byte (zero points are folded in).

``Panel`` and ``Words`` are the two sides that kernels for many rows multiply.

    panel codes   uint8   [tiles, G, 8 steps, 64]   step = columns 4 * step .. 4 * step + 3
    panel scales  float32 [tiles, G, 16]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec
from relax_passes.terms import common_factor

from . import merge

ZERO_POINT_OFFSET = 16
STEPS = GROUP // 4
Transform = Callable[[Expr], Expr]  # vector of codes, upper bits undefined -> bytes
Use = Callable[[Transform], None]


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

    def start(self, row: Expr, group: Expr) -> Expr:
        """Return what the offsets of W (and of x) add to a row's sum, to be taken off up front."""
        if not self.times:
            return e.const(0, "int32", TILE_ROWS)
        total = e.load(self.sums, row, group)
        return e.let(e.splat(total if self.times == 1 else total * self.times, TILE_ROWS))

    def scale(self, row: Expr, group: Expr) -> Expr:
        """Return the scale of a row and group, in all lanes."""
        value = e.load(self.scales, row, group)
        if self.factor != 1.0:
            value = value * e.const(self.factor, "float32")
        return e.let(e.splat(value, TILE_ROWS))

    def unstarted(self) -> Words:
        """Return the same for bytes of W that have no offset."""
        return replace(self, times=0)


@dataclass(frozen=True)
class Panel:
    """Decoded row tiles: uint8 [tiles * G, 8 steps, 64], float32 [tiles * G, 16].

    ``starts`` int32 [tiles * G, 16], if any, is a further start of the accumulators.
    """

    codes: Any
    scales: Any
    starts: Any = None

    def start(self, at: Expr) -> Expr | None:
        """Return the further start of one tile and group."""
        return None if self.starts is None else e.let(e.load(self.starts, at, 0, lanes=TILE_ROWS))


def supports(fmt: Any) -> bool:
    """Whether a format's tiles can be bytes with one scale a group."""
    if fmt.group_size != GROUP:
        return False
    return len(fmt.terms) == 1 or merge.supports(fmt)


def offset(fmt: Any) -> int:
    """Return what is added to every weight to make it an unsigned byte."""
    if len(fmt.terms) == 2:
        return merge.OFFSET
    constant = fmt.terms[0].offset
    return ZERO_POINT_OFFSET if isinstance(constant, str) else constant


class PanelDecoder:
    """Emits the decode of one tile and group into the panel."""

    def __init__(self, spec: LinearSpec, isa: Avx512, buffers: Any):
        self.spec, self.isa, self.buffers, self.fmt = spec, isa, buffers, spec.fmt
        self.reader = ScaleReader(spec.fmt, buffers["w_scales"])
        self.factor = common_factor(spec.fmt.terms)
        self.eight_bit = spec.fmt.terms[0].table is None
        self.tables = (
            [None if self.eight_bit else isa.table(spec.fmt.terms[0].table)]
            if len(spec.fmt.terms) == 1
            else merge.tables(spec.fmt, isa)
        )

    def decode(self, tile: Expr, group: Expr, codes: Any, scales: Any, at: Expr) -> None:
        """Decode tile ``tile``, group ``group`` to codes[at, step, :] and scales[at, :]."""
        count = self.spec.tile_code_bytes // 64

        def vectors(transform: Any) -> None:
            with e.serial(0, count) as v:
                for i, value in enumerate(self.vector(tile, group, v, transform)):
                    e.store(codes, value, at, v * (STEPS // count) + i, 0, lanes=64)

        e.store(scales, self.choose(tile, group, vectors, vectors), at, 0, lanes=16)

    def choose(
        self, tile: Expr, group: Expr, usual: Use, rare: Use, ahead: merge.Ahead | None = None
    ) -> Expr:
        """Emit ``usual`` or ``rare`` with a transform from looked-up tables to bytes.

        Returns the scales of the bytes, float32 of 16 rows. ``ahead`` is what ``look_ahead`` made.
        """
        if len(self.fmt.terms) == 1:
            transform, scale = self.single(tile, group)
            usual(transform)
            return scale
        if ahead is not None:
            near = ahead.get()
            chosen = e.Register("float32", TILE_ROWS, near.scale)
            with e.when(e.unlikely(near.rare) != 0):
                with e.then():
                    scales = self._merge(tile, group)
                    rare(scales.any_pair())
                    chosen.set(scales.scale)
                with e.otherwise():
                    usual(near.transform(self.isa, self.tables))
            return chosen.get()
        scales = self._merge(tile, group)
        with e.when(scales.rare != 0):
            with e.then():
                rare(scales.any_pair())
            with e.otherwise():
                usual(scales.near_pair())
        return scales.scale

    def look_ahead(self, tile: Expr, group: Expr, ahead: merge.Ahead | None) -> merge.Ahead | None:
        """Emit what can be made of a group's scales before it is multiplied; None if nothing."""
        if len(self.fmt.terms) == 1:
            return None
        ahead = ahead or merge.Ahead()
        ahead.set(self._merge(tile, group).near())
        return ahead

    def _merge(self, tile: Expr, group: Expr) -> merge.Merge:
        return merge.Merge(self.fmt, self.reader, self.isa, self.tables, tile, group)

    def vector(self, tile: Expr, group: Expr, v: Expr, transform: Any) -> list[Expr]:
        """Decode packed vector ``v`` to the one or two vectors of bytes that it holds."""
        packed = e.let(e.load(self.buffers["w_codes"], tile, group, v * 64, lanes=64))
        return [e.let(transform(codes)) for codes in self._halves(packed)]

    def _halves(self, packed: Expr) -> list[Expr]:
        if self.eight_bit:
            return [packed]
        return [e.let(self.isa.low(packed)), e.let(self.isa.high(packed))]

    def single(self, tile: Expr, group: Expr) -> tuple[Transform, Expr]:
        """Return codes -> bytes and the scales, for a format of one term."""
        term = self.fmt.terms[0]
        scale = self.reader.scale(term.scale, tile, group, 0, 0, 16)
        if term.factor < 0:
            scale = e.const(0.0, "float32", 16) - scale
        if not isinstance(term.offset, str):
            return self._look_up, scale
        zero = self.reader.stored(term.offset, tile, group, 0, 0, 16)
        shift = e.const(ZERO_POINT_OFFSET, "int32", 16) - e.cast(zero, "int32", 16)
        shift = e.let(e.bits(shift * e.const(0x01010101, "int32", 16), "uint8", 64))
        return (lambda codes: self._look_up(codes) + shift), scale

    def _look_up(self, codes: Expr) -> Expr:
        return codes if self.eight_bit else self.isa.lookup(self.tables[0], codes)
