"""Exact float32 weights out of packed tiles, for the strict mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import LinearSpec
from relax_passes.terms import common_factor

Scales = list[tuple[Expr, Any]]  # of each term: its scale times its relative factor, its offset


class FloatWeights:
    """Emits the decode of a part of a tile's rows.

    Attributes
    ----------
    factor : float
        What the sums have to be multiplied by in the end.
    vectors, step : int
        Packed vectors of a group, and columns of one.
    """

    def __init__(self, spec: LinearSpec, isa: Isa, buffers: Any):
        self.isa, self.buffers = isa, buffers
        self.terms = spec.fmt.terms
        self.reader = ScaleReader(spec.fmt, buffers["w_scales"])
        self.factor = common_factor(self.terms)
        self.eight_bit = self.terms[0].table is None
        self.tables = [None if t.table is None else isa.float_table(t.table) for t in self.terms]
        self.vectors, self.step = spec.tile_code_bytes // 64, 4 if self.eight_bit else 8

    def scales(self, tile: Expr, group: Expr, sub: int, part: int) -> Scales:
        """Load (scale times relative factor, offset vector or None) for each term."""
        lanes, out = self.isa.rows, []
        args = (tile, group, sub, part * lanes, lanes)
        for t in self.terms:
            scale = self.reader.scale(t.scale, *args)
            relative = t.factor / self.factor
            if relative != 1.0:
                scale = scale * e.const(relative, "float32", lanes)
            offset = None
            if isinstance(t.offset, str):
                offset = e.let(self.reader.zero_point(t.offset, *args))
            elif t.offset:
                offset = e.const(float(t.offset), "float32", lanes)
            out.append((e.let(scale), offset))
        return out

    def columns(
        self, tile: Expr, group: Expr, part: int, v: Expr, scales: Scales
    ) -> Iterator[list[Expr]]:
        """Decode packed vector ``v``; yields the values of each term, unscaled, of every column."""
        isa = self.isa
        at = v * 64 + part * isa.bytes
        packed = e.let(e.load(self.buffers["w_codes"], tile, group, at, lanes=isa.bytes))
        for values in isa.float_columns(packed, self.tables, self.eight_bit):
            yield [
                value if offset is None else e.let(value - offset)
                for value, (_, offset) in zip(values, scales, strict=True)
            ]

    def weight(self, values: list[Expr], scales: Scales) -> Expr:
        """Scale a column's values and add them up."""
        weight: Expr = None
        for (scale, _), w in zip(scales, values, strict=True):
            product = w * scale if weight is None else e.fma(w, scale, weight, self.isa.rows)
            weight = e.let(product)
        return weight
