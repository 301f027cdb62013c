"""Attention of steps in which sequences have several rows, over rounded pages.

A sequence's keys and values are brought into the panels of ``attention/prefill.py``, whose tiles
then attend: those of the step as they are, those in 16 bits, and the others decoded from pages.
Each query sees those of its own step unrounded. Panels are made for `HEADS` heads at a time, which
bounds what they take: `amx_tvm.runtime.budget` counts it.
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
from relax_passes.kernels.cpu.attention.prefill import KEYS, Prefill

from .codes import Codes, scale_at, scales_at
from .decode import finish
from .layout import BEFORE, EXACT, PAGE, PANEL, PLACE, ROW, Layout, Step
from .layout import ROWS as COUNT
from .leave import Rounding, halves
from .pages import Pages
from .store import remember

HEADS = 2  # kv heads whose panels there are at once


class PackedPrefill(Prefill):
    """Emits the kernel's body.

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
        super().__init__(config, v.VectorTarget.of(target), paged=False)
        self.layout, self.codes = layout, Codes(layout, target)

    def prepare(self, step: Step, sinks: bool) -> None:
        """Allocate what a step needs, in front of every branch (see `PackedDecode.prepare`)."""
        if sinks:
            self.lse = v.scratch("lse", step.n, self.config.num_heads)
        panels = v.ceil_div(step.most * PAGE, KEYS) * (KEYS // PANEL)
        self.packed_k = v.scratch("packed_k", HEADS, panels, PANEL * self.d)
        self.packed_v = v.scratch("packed_v", HEADS, step.most * PAGE, self.d)

    def emit(
        self, step: Step, layer: Expr, inputs: tuple[Any, Any, Any], output: Any, sinks: Any
    ) -> None:
        """Attend with the rows of a step, then round them, and keep the newest in 16 bits.

        Parameters
        ----------
        inputs : tuple of Buffer
            q [n, heads, d], k and v [n, kv_heads, d].
        """
        config = self.config
        self.step, self.layer = step, layer
        self.q, self.k, self.v = inputs
        self.output = output
        self.scale = e.const(config.specs[0].scale * math.log2(math.e), "float32")
        with T.serial(0, step.count) as b:
            self._sequence(b)
        with T.serial(0, step.count) as b:
            self._round(b)
            self._remember(b)
        with T.parallel(0, step.n) as t, T.serial(0, config.num_heads) as h:
            lse = self.lse[t, h] if sinks is not None else e.const(0.0, "float32")
            finish(self.layout, output, [t, h], lse, sinks)

    def _sequence(self, b: Expr) -> None:
        step, config = self.step, self.config
        self.b = b
        self.q_begin = e.let(step.sequences[b, ROW], "q_begin")
        self.q_len = e.let(step.sequences[b, COUNT], "q_len")
        self.before = e.let(step.sequences[b, BEFORE], "before")
        self.exact = e.let(tirx.min(step.sequences[b, EXACT], self.before), "exact")
        self.place = e.let(step.sequences[b, PLACE].astype("int64"), "place")
        self.stop = v.opaque(self.before + self.q_len, "stop")
        low, _ = self._visible(e.const(0))
        # From the first block of keys on that a query sees: its values are all multiplied.
        first = v.opaque(v.div(low, KEYS) * (KEYS // PANEL), "first_panel")
        panels = v.opaque(v.ceil_div(self.stop, PANEL) - first, "panels")
        blocks = self._blocks()
        with T.serial(0, -(-config.num_kv_heads // HEADS)) as part:
            head0 = v.opaque(part * HEADS, "head0")
            heads = v.opaque(tirx.min(config.num_kv_heads - head0, HEADS), "heads")
            with T.parallel(0, heads * panels) as i:
                self._pack(head0 + v.div(i, panels), first + v.mod(i, panels))
            with T.parallel(0, heads * (config.group * blocks)) as item:
                i = v.mod(item, blocks)
                block = tirx.Select(v.mod(i, 2) == 0, v.div(i, 2), blocks - 1 - v.div(i, 2))
                head = head0 * config.group + v.div(item, blocks)
                self._item(head, v.opaque(block, "block"))

    def _packed_head(self, h: Expr) -> Expr:
        return v.mod(h, HEADS)

    def _round(self, b: Expr) -> None:
        """Round those of a sequence's rows that are no longer among the newest into their pages."""
        step, newest = self.step, self.layout.spec.newest
        row0 = e.let(step.sequences[b, ROW], "row0")
        before = e.let(step.sequences[b, BEFORE], "before")
        end = v.opaque(before + step.sequences[b, COUNT] - newest, "end")
        first = v.opaque(v.div(before, PAGE), "first_page")
        pages = v.opaque(tirx.max(v.ceil_div(end, PAGE) - first, 0), "pages")
        with T.If(before < end), T.Then(), T.parallel(0, self.config.num_kv_heads * pages) as item:
            h = e.let(v.div(item, pages), "h")
            self.codes.begin()
            start = v.opaque((first + v.mod(item, pages)) * PAGE, "start")

            def take(token: Expr, key: Any, value: Any) -> None:
                row = [e.let(row0 + token - before, "row"), h]
                halves(self.k, row, key, self.d)
                if value is not None:
                    halves(self.v, row, value, self.d)

            rounding = Rounding(self.layout, self.codes, step, take)
            low = v.opaque(tirx.max(start, before), "low")
            rounding.run(b, self.layer, h, low, v.opaque(tirx.min(start + PAGE, end), "high"), None)

    def _remember(self, b: Expr) -> None:
        """Keep the newest of a sequence's rows, and the first, in 16 bits."""
        step, spec = self.step, self.layout.spec
        begin = e.let(step.sequences[b, ROW], "begin")
        rows = e.let(step.sequences[b, COUNT], "rows")
        before = e.let(step.sequences[b, BEFORE], "before")
        place = e.let(step.sequences[b, PLACE].astype("int64"), "place")
        with T.parallel(0, self.config.num_kv_heads) as h, T.serial(0, rows) as row:
            kept = tirx.Or(before + row < spec.first, row >= rows - spec.newest)
            with T.If(kept), T.Then():
                at = [place, self.layer, h]
                where = [begin + row, h]
                remember(self.layout, step, at, before + row, (self.k, self.v), where)

    def _visible(self, row: Expr) -> tuple[Expr, Expr]:
        """First and one past the last token that a query sees."""
        high = self.before + row + 1
        if not self.config.window:
            return e.const(0), high
        return tirx.max(high - self.config.window, 0), high

    def _pack(self, h: Expr, panel: Expr) -> None:
        """Bring 16 tokens of one head into a panel; lanes beyond the sequence stay undefined."""
        spec = self.layout.spec
        h, panel = e.let(h, "head"), v.opaque(panel, "panel")
        place = e.let(self._packed_head(h), "place")
        first = e.let(panel * PANEL, "first")
        with T.If(first < self.exact), T.Then():
            self._decode(h, place, panel, first)
        with T.serial(0, tirx.min(self.stop - first, PANEL)) as t:
            token = e.let(first + t, "token")
            with T.If(token >= self.before):
                with T.Then():
                    row = e.let(self.q_begin + token - self.before, "row")
                    with T.serial(0, self.d) as i:
                        key = v.load(self.k, [row, h, i], 1)
                        T.buffer_store(self.packed_k, key, [place, panel, i * PANEL + t])
                    with T.serial(0, self.columns) as c:
                        value = v.load(self.v, [row, h, c * v.LANES])
                        v.store(self.packed_v, value, [place, token, c * v.LANES])
                with T.Else(), T.If(tirx.Or(token >= self.exact, token < spec.first)), T.Then():
                    own = token < spec.first
                    slot = tirx.Select(own, spec.newest + token, v.mod(token, spec.newest))
                    self._recall(h, place, panel, t, token, v.opaque(slot, "slot"))

    def _recall(self, h: Expr, place: Expr, panel: Expr, t: Expr, token: Expr, slot: Expr) -> None:
        """Bring a token in 16 bits into a panel."""
        spec, recent = self.layout.spec, self.step.recent
        at = [self.place, self.layer, h]
        with T.serial(0, self.d) as i:
            key = recent[(*at, i * spec.recent + slot)].astype("float32")
            T.buffer_store(self.packed_k, key, [place, panel, i * PANEL + t])
        begin = self.d * spec.recent
        with T.serial(0, self.columns) as c:
            value = v.load(recent, [*at, begin + slot * self.d + c * v.LANES])
            v.store(self.packed_v, value, [place, token, c * v.LANES])

    def _decode(self, h: Expr, place: Expr, panel: Expr, first: Expr) -> None:
        """Decode 16 tokens of a page."""
        layout, codes, pages = self.layout, self.codes, self.step.pages
        codes.begin()
        centred = layout.spec.centred
        number = v.div(first, PAGE)
        page = e.let(self.step.tables[self.b, number].astype("int64"), "page")
        slot0 = e.let(first - number * PAGE, "slot0")
        at = [page, self.layer, h]
        inside = e.let(v.div(slot0, PANEL), "inside")
        mean = v.scratch("mean", self.d)
        for group in range(layout.groups if centred else 0):
            for i, part in enumerate(Pages(layout, codes, pages).mean_of(at, group)):
                v.store(mean, part, [group * GROUP + i * v.LANES])
        for group in range(layout.groups):
            for half in range(layout.subgroups):

                def stored(part: int, group: int = group) -> Expr:
                    where = [*at, layout.key_scales(inside, group, part)]
                    return scales_at(pages, where, layout.scale_bytes)

                scales = codes.scale(stored, half)
                size = GROUP // layout.subgroups // codes.columns
                with T.serial(0, size) as i:
                    vector = half * size + i
                    where = layout.key_codes(inside, group) + vector * 64
                    words = e.let(e.bits(e.load(pages, *at, where, lanes=64), "int32", 16), "words")
                    for c, shift in enumerate(codes.shifts):
                        channel = group * GROUP + vector * codes.columns + c
                        key = codes.scaled(codes.number(words, shift), scales)
                        key = key + v.splat(mean[channel]) if centred else key
                        v.store(self.packed_k, key, [place, panel, channel * PANEL])
        with T.serial(0, PANEL) as t:
            for group in range(layout.groups):

                def scales_of(half: int, group: int = group) -> list[Expr]:
                    found = []
                    for i, tensor in enumerate(layout.format.scale_tensors):
                        part = i * layout.subgroups + (half if layout.subgroups == 2 else 0)
                        where = layout.value_scales(group, part, slot0 + t)
                        stored = scale_at(pages, [*at, where], layout.scale_bytes)
                        scale = layout.format.decode_scale_tir(tensor.name, stored)
                        found.append(e.let(v.splat(e.let(scale)), "scale"))
                    return found

                where = layout.value_codes(slot0 + t, group)
                for half, value in enumerate(codes.pair(pages, [*at, where], scales_of)):
                    at_ = [place, first + t, group * GROUP + half * v.LANES]
                    v.store(self.packed_v, value, at_)
