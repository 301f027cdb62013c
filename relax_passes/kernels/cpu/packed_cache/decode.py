"""Attention of one new token a sequence over rounded pages and the tokens in 16 bits.

Work items are parts of the sequences' pages, as in ``attention/decode.py``, whose softmax and merge
these are. A page's keys and values are decoded in registers: 16 tokens are the lanes of the scores,
16 channels those of the values. The last part of a sequence also takes its tokens in 16 bits.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from relax_passes.cache_spec import GROUP
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.attention import vector as v
from relax_passes.kernels.cpu.attention.config import KVCacheConfig
from relax_passes.kernels.cpu.attention.functions import exp2, soft_cap

from .codes import Codes, scales_at
from .layout import BEFORE, EXACT, PAGE, PANEL, Layout, Step
from .pages import Pages
from .recent import RecentTokens
from .turn import turn_size, turned

_ITEMS = 32  # parts are made until there are this many items
_SERIAL_BYTES = 192 * 1024  # pages below this are read faster than other threads wake up
_SUMS = 16  # registers for sums of values
_PREFETCH_BYTES = 4096  # how far ahead of the stream to fetch


class PackedDecode(RecentTokens):
    """Emits the kernel's body; the attributes are its buffers and those of the current item.

    Parameters
    ----------
    layout : Layout
        Of the cache.
    config : KVCacheConfig
        Of one layer.
    target : Target, dict or TargetInfo
        What is compiled for.
    """

    def __init__(self, layout: Layout, config: KVCacheConfig, target: Any) -> None:
        super().__init__(config, v.VectorTarget.of(target))
        self.layout, self.codes = layout, Codes(layout, target)
        self.chunk = max(PAGE, self.slots)  # scores at once

    def prepare(self, step: Step) -> None:
        """Allocate what a step needs, sized by bounds that its tensors' shapes give.

        In front of every branch: TVM moves allocations up, to where nothing that was read is known.
        """
        heads = self.config.num_heads
        most = step.count + _ITEMS
        self._allocate_parts(most)
        self.lse = v.scratch("lse", step.count, heads)
        wanted = tirx.max(v.div(e.const(_ITEMS), step.count), 1)
        self.parts = v.opaque(tirx.max(tirx.min(wanted, step.most), 1), "parts")

    def emit(self, step: Step, layer: Expr, q: Any, output: Any, sinks: Any) -> None:
        """Attend with the queries of a step: q and output [sequences, heads, d]."""
        self.step, self.layer, self.q, self.sinks = step, layer, q, sinks
        factor = self.config.specs[0].scale * math.log2(math.e)
        self.scale = e.const(factor, "float32")
        items = e.let(step.count * self.parts, "items")
        bytes_ = step.count * step.most * (self.layout.kv_heads * self.layout.block)
        alone = tirx.And(bytes_ <= _SERIAL_BYTES, step.count < v.FEW_TOKENS)
        self._run(alone, items, step.count, output, self.lse)

    def _merge_heads(self, b: Expr, output: Any, lse: Any) -> None:
        """Combine the parts of one sequence, and turn the result back."""
        self.first, self.splits = e.let(b * self.parts, "first"), self.parts
        with T.serial(0, self.config.num_heads) as h:
            self._merge(b, h, output, lse)
            finish(self.layout, output, [b, h], lse[b, h], self.sinks)

    def _item(self, item: Expr) -> None:
        """Attend to one part of one sequence."""
        step = self.step
        spec = self.layout.spec
        b, part = e.let(v.div(item, self.parts), "b"), e.let(v.mod(item, self.parts), "part")
        self.b = b
        self.last = e.let(step.sequences[b, BEFORE], "last")  # the new token's position
        low = e.const(0)
        if self.config.window:
            low = v.opaque(tirx.max(self.last - (self.config.window - 1), 0), "low")
        self.low = low
        exact = tirx.max(step.sequences[b, EXACT], self.last + 1 - spec.newest)
        self.exact = v.opaque(exact, "exact")
        self.begin = v.opaque(tirx.max(low, spec.first), "begin")
        self.codes.begin()
        self._allocate_item()
        scales = self.layout.groups * self.layout.parts
        self.value_scales = v.scratch("value_scales", scales, PAGE)
        self.shared = v.scratch("shared", self.group, v.LANES)
        self._start(b)
        # Pages that hold rounded tokens which the query sees, shared out to the parts.
        first = v.opaque(v.div(self.begin, PAGE), "first_page")
        pages = v.opaque(tirx.max(v.ceil_div(self.exact, PAGE) - first, 0), "pages")
        each = v.opaque(v.ceil_div(pages, self.parts), "each")
        start = v.opaque(part * each, "start")
        with T.serial(0, tirx.max(tirx.min(each, pages - start), 0)) as i:
            number = v.opaque(first + start + i, "number")
            self._rounded_page(number)
        with T.If(part == self.parts - 1), T.Then():
            self._recent()
        self._leave(item)

    def _rounded_page(self, number: Expr) -> None:
        """Attend to the rounded tokens of a page, one kv head after the other."""
        page = e.let(self.step.tables[self.b, number].astype("int64"), "page")
        slot0 = e.let(number * PAGE, "slot0")
        low = v.opaque(tirx.max(self.begin - slot0, 0), "low")
        high = v.opaque(tirx.min(self.exact - slot0, PAGE), "high")
        with T.If(low < high), T.Then(), T.serial(0, self.config.num_kv_heads) as h:
            at = [page, self.layer, h]
            head0 = v.opaque(h * self.group, "head0")
            self.used = v.opaque(v.ceil_div(high, v.LANES), "used")
            if self.layout.spec.centred:
                self._mean_scores(at, head0)
            with T.serial(0, self.used) as panel:
                self._keys(at, head0, panel, low, high)
            with T.serial(0, self.group) as g:
                self._softmax(head0 + g)
            self._scales(at)
            for tile in self._tiles(self.heads_tile, self.group):
                most = max(1, _SUMS // (2 * len(tile)))
                for groups in self._tiles(most, self.layout.groups):
                    self._page_values(at, head0, tile, groups, low, high)

    def _mean_scores(self, at: list, head0: Expr) -> None:
        """What the mean that a page's keys are stored less adds to each head's scores."""
        pages = Pages(self.layout, self.codes, self.step.pages)
        groups = range(self.layout.groups)
        mean = [v.hold(part, "mean") for g in groups for part in pages.mean_of(at, g)]
        with T.serial(0, self.group) as g:
            total = v.Register(v.const(0.0), "total")
            for c, part in enumerate(mean):
                total.set(v.load(self.qs, [head0 + g, c * v.LANES]) * part + total.get())
            score = v.reduce_lanes(total.get(), lambda a, b: a + b)
            v.store(self.shared, score, [g, 0])

    def _keys(self, at: list, head0: Expr, panel: Expr, low: Expr, high: Expr) -> None:
        """Scores of 16 tokens of a page."""
        layout, codes, pages = self.layout, self.codes, self.step.pages
        columns = codes.columns
        for tile in self._tiles(self.heads_tile, self.group):
            sums = {g: [v.Register(v.const(0.0), "acc") for _ in range(2)] for g in tile}
            for g in tile if layout.spec.centred else ():
                sums[g][0].set(v.load(self.shared, [e.const(g), 0]))
            for group in range(layout.groups):
                halves = [self._key_scales(at, panel, group, half) for half in (0, 1)]
                for half, scales in enumerate(halves if layout.subgroups == 2 else halves[:1]):
                    size = GROUP // layout.subgroups // columns
                    with T.serial(0, size) as i:
                        vector = half * size + i
                        place = layout.key_codes(panel, group) + vector * 64
                        raw = e.load(pages, *at, place, lanes=64)
                        words = e.let(e.bits(raw, "int32", 16), "words")
                        if tile.start == 0:
                            e.prefetch(pages, *at, place + _PREFETCH_BYTES)
                        for c, shift in enumerate(codes.shifts):
                            key = v.hold(codes.scaled(codes.number(words, shift), scales), "key")
                            channel = group * GROUP + vector * columns + c
                            for g in tile:
                                acc = sums[g][c % 2]
                                query = v.splat(self.qs[head0 + g, channel])
                                acc.set(query * key + acc.get())
            for g in tile:
                score = soft_cap(sums[g][0].get() + sums[g][1].get(), self.config.soft_cap)
                lanes = T.Ramp(panel * PANEL, 1, v.LANES)
                seen = tirx.And(lanes >= v.splat(low), lanes < v.splat(high))
                self._score(head0 + g, panel * PANEL, score, seen)

    def _key_scales(self, at: list, panel: Expr, group: int, half: int) -> list[Expr]:
        layout = self.layout

        def stored(part: int) -> Expr:
            place = [*at, layout.key_scales(panel, group, part)]
            return scales_at(self.step.pages, place, layout.scale_bytes)

        return self.codes.scale(stored, half) if half < layout.subgroups else []

    def _scales(self, at: list) -> None:
        """Decode the scales of a page's values."""
        layout = self.layout
        names = [t.name for t in layout.format.scale_tensors for _ in range(layout.subgroups)]
        with T.serial(0, PAGE // v.LANES) as i:
            for group in range(layout.groups):
                for part, name in enumerate(names):
                    place = layout.value_scales(group, part, i * v.LANES)
                    stored = scales_at(self.step.pages, [*at, place], layout.scale_bytes)
                    found = layout.format.decode_scale_tir(name, stored)
                    v.store(self.value_scales, found, [group * layout.parts + part, i * v.LANES])

    def _page_values(
        self, at: list, head0: Expr, tile: range, groups: range, low: Expr, high: Expr
    ) -> None:
        """Add a page's weighted values, of some heads and channels."""
        sums = {
            (g, c): v.Register(v.load(self.o, [head0 + g, c * v.LANES]), "acc")
            for g in tile
            for c in range(2 * groups.start, 2 * groups.stop)
        }
        with T.serial(0, high - low) as i:
            t = e.let(low + i, "t")
            weights = [e.let(v.splat(self.s[head0 + g, t]), "weight") for g in tile]
            for group in groups:
                for half, value in enumerate(self._value(at, t, group)):
                    for g, weight in zip(tile, weights, strict=True):
                        acc = sums[g, 2 * group + half]
                        acc.set(weight * value + acc.get())
        for (g, c), register in sums.items():
            v.store(self.o, register.get(), [head0 + g, c * v.LANES])

    def _value(self, at: list, t: Expr, group: int) -> list[Expr]:
        """The 32 channels of a token's value in a group, two vectors."""
        layout, codes = self.layout, self.codes
        place = layout.value_codes(t, group)
        tensors = range(len(layout.format.scale_tensors))

        def scales(half: int) -> list[Expr]:
            sub = half if layout.subgroups == 2 else 0
            rows = [group * layout.parts + i * layout.subgroups + sub for i in tensors]
            return [e.let(v.splat(self.value_scales[row, t]), "scale") for row in rows]

        return codes.pair(self.step.pages, [*at, place], scales)


def finish(layout: Layout, output: Any, row: list, lse: Expr, sinks: Any) -> None:
    """Turn a head's output back, in place, and scale it by what its sink leaves.

    Parameters
    ----------
    output, row : Buffer, list of Expr
        float32 [.., heads, d], and the head's place.
    lse : Expr
        Log-sum-exp of its scores, in log2 units.
    sinks : Buffer or None
        float32 [heads]: see ``attention/sinks.py``.
    """
    columns = range(0, layout.head_dim, v.LANES)
    found = [v.hold(v.load(output, [*row, j]), "out") for j in columns]
    if layout.spec.turned:
        found = turned(found, turn_size(layout.head_dim))
    if sinks is not None:
        under = sinks[row[-1]] * e.const(math.log2(math.e), "float32") - lse
        share = exp2(v.hold(tirx.min(v.splat(under), v.const(126.0)), "under"))
        factor = v.hold(v.const(1.0) / (v.const(1.0) + share), "factor")
        found = [part * factor for part in found]
    for j, part in zip(columns, found, strict=True):
        v.store(output, part, [*row, j])
