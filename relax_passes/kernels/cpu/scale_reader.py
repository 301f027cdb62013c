"""Load the scales of packed weights."""

from __future__ import annotations

from typing import Any

from relax_passes.spec import GROUP, TILE_ROWS

from . import emit as e
from .emit import Expr


class ScaleReader:
    """Loads the scale vectors of one tile and group out of ``w_scales`` [T, G, S].

    The S bytes hold, for each scale tensor in order and each sub-group of the 32 columns, 16 rows
    of one element each.
    """

    def __init__(self, fmt: Any, buffer: Any):
        self.fmt, self.buffer = fmt, buffer
        self.sub_groups = GROUP // fmt.group_size
        self.offsets: dict[str, tuple[int, int, str]] = {}
        position = 0
        for s in fmt.scale_tensors:
            self.offsets[s.name] = (position, s.bytes, s.dtype)
            position += TILE_ROWS * s.bytes * self.sub_groups

    def stored(self, name: str, tile: Expr, group: Expr, sub: int, first: int, lanes: int) -> Expr:
        """Load the stored elements of rows first .. first+lanes-1 as the storage type."""
        start, size, dtype = self.offsets[name]
        at = start + (sub * TILE_ROWS + first) * size
        raw = e.load(self.buffer, tile, group, at, lanes=lanes * size)
        return raw if dtype == "uint8" else e.bits(raw, dtype, lanes)

    def element(self, name: str, tile: Expr, group: Expr, sub: Expr, row: Expr) -> Expr:
        """Load the stored element of one row, whose number is known at run time."""
        start, size, _ = self.offsets[name]
        at = e.let(start + (sub * TILE_ROWS + row) * size)
        low = e.load(self.buffer, tile, group, at)
        if size == 1:
            return low
        high = e.cast(e.load(self.buffer, tile, group, at + 1), "uint16")
        return e.cast(low, "uint16") | (high << e.const(8, "uint16"))

    def scale(self, name: str, tile: Expr, group: Expr, sub: int, first: int, lanes: int) -> Expr:
        """Load and decode float32 scales."""
        stored = self.stored(name, tile, group, sub, first, lanes)
        return self.fmt.decode_scale_tir(name, stored)

    def zero_point(self, name: str, tile: Expr, group: Expr, sub: int, first: int, lanes: int):  # noqa: ANN201
        """Load integer zero points as float32."""
        return e.cast(self.stored(name, tile, group, sub, first, lanes), "float32", lanes)
