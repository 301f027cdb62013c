"""Writing rounded tokens into their pages, and the means that keys are stored less.

A mean is near keys' own, rounded as a value is. Keys of a page are stored less it and read more it,
so that what all of them share, above all biases of the projection, takes no bits of each. What it
was rounded to does not matter: the keys' rounding begins at what is stored.
"""

from __future__ import annotations

from typing import Any

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from relax_passes.cache_spec import GROUP
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.attention import vector as v

from .codes import Codes, scale_at
from .encode import Encoded, encoded
from .layout import PANEL, Layout


class Pages:
    """Emits what reads and writes single tokens of pages, and means.

    Parameters
    ----------
    layout : Layout
        Of the cache.
    codes : Codes
        What decodes means; its table is made (`Codes.begin`).
    pages : Buffer
        The step's.
    """

    def __init__(self, layout: Layout, codes: Codes, pages: Any) -> None:
        self.layout, self.codes, self.pages = layout, codes, pages

    def token(self, at: list, slot: Expr, key: Any, value: Any) -> None:
        """Round a token's key and value, float32 [d], into a block.

        Parameters
        ----------
        at : list of Expr
            Page, layer, head.
        slot : Expr
            The token's place in the page.
        """
        panel, lane = e.let(v.div(slot, PANEL), "panel"), e.let(v.mod(slot, PANEL), "lane")
        with T.serial(0, self.layout.groups) as group:
            vectors = self._vectors(key, group)
            if self.layout.spec.centred:
                means = self.mean_of(at, group)
                vectors = [v.hold(x - y, "rest") for x, y in zip(vectors, means, strict=True)]
            self._key(encoded(self.layout, vectors), at, panel, lane, group)
        with T.serial(0, self.layout.groups) as group:
            made = encoded(self.layout, self._vectors(value, group))
            place = self.layout.value_codes(slot, group)
            self._row(
                made, at, place, [self.layout.value_scales(group, p, slot) for p in self._parts]
            )

    def store_mean(self, at: list, sums: Any, count: Expr) -> None:
        """Round the mean of so many keys, whose sums float32 [d] are given, into a block."""
        share = e.let(v.splat(e.const(1.0, "float32") / count.astype("float32")), "share")
        with T.serial(0, self.layout.groups) as group:
            vectors = [v.hold(x * share, "mean") for x in self._vectors(sums, group)]
            scales = [self.layout.mean_scale(group, part) for part in self._parts]
            self._row(encoded(self.layout, vectors), at, self.layout.mean_codes(group), scales)

    def mean_of(self, at: list, group: Any) -> list[Expr]:
        """Read the 32 channels of a block's mean in a group, two vectors."""
        layout, halves = self.layout, self.layout.subgroups == 2

        def scales(half: int) -> list[Expr]:
            found = []
            for i, tensor in enumerate(layout.format.scale_tensors):
                part = i * layout.subgroups + (half if halves else 0)
                place = [*at, layout.mean_scale(group, part)]
                stored = scale_at(self.pages, place, layout.scale_bytes)
                scale = layout.format.decode_scale_tir(tensor.name, stored)
                found.append(e.let(v.splat(e.let(scale)), "scale"))
            return found

        return self.codes.pair(self.pages, [*at, layout.mean_codes(group)], scales)

    @property
    def _parts(self) -> range:
        return range(self.layout.parts)

    def _vectors(self, buffer: Any, group: Any) -> list[Expr]:
        places = [group * GROUP, group * GROUP + v.LANES]
        return [v.hold(v.load(buffer, [place]), "value") for place in places]

    def _key(self, group: Encoded, at: list, panel: Expr, lane: Expr, number: Expr) -> None:
        """Write a token's row of a tile."""
        layout, pages = self.layout, self.pages
        codes = e.scratch(GROUP, "int32", "codes")
        for i, code in enumerate(group.codes):
            e.store(codes, code, i * v.LANES, lanes=v.LANES)
        base = e.let(layout.key_codes(panel, number) + lane * 4, "base")
        if layout.format.code_bits == 8:
            for i in range(GROUP):
                byte = codes[i].astype("uint8")
                T.buffer_store(pages, byte, [*at, base + (i // 4 * 64 + i % 4)])
        else:
            for i in range(GROUP // 2):
                low = i // 4 * 8 + i % 4
                byte = (codes[low] | (codes[low + 4] << e.const(4))).astype("uint8")
                T.buffer_store(pages, byte, [*at, base + (i // 4 * 64 + i % 4)])
        for part, scale in enumerate(group.scales):
            place = layout.key_scales(panel, number, part) + lane * layout.scale_bytes
            self._scale(scale, at, place)

    def _row(self, made: Encoded, at: list, place: Expr, scales: list[Expr]) -> None:
        """Write 32 channels of a value or a mean."""
        base, (low, high) = e.let(place, "base"), made.codes
        if self.layout.format.code_bits == 8:
            e.store(self.pages, e.cast(low, "uint8", 16), *at, base, lanes=16)
            e.store(self.pages, e.cast(high, "uint8", 16), *at, base + 16, lanes=16)
        else:
            both = low | (high << v.const(4, dtype="int32"))
            e.store(self.pages, e.cast(both, "uint8", 16), *at, base, lanes=16)
        for scale, where in zip(made.scales, scales, strict=True):
            self._scale(scale, at, where)

    def _scale(self, scale: Expr, at: list, place: Expr) -> None:
        """Store a scale of one byte or two."""
        place = e.let(place, "place")
        if self.layout.scale_bytes == 1:
            T.buffer_store(self.pages, scale, [*at, place])
            return
        e.store(self.pages, e.bits(scale, "uint8x2"), *at, place, lanes=2)
