"""Attention of many new tokens: among themselves (ragged), and over the paged cache.

Work items are (query head, block of up to 48 queries).  An item walks the keys it may see in
blocks of 128 and keeps a running maximum, sum and unnormalized output for every query (flash
attention):

    scores    48 x 128 tile = Q K^T   register tiles of rows x two panels of 16 keys
    softmax   mask, new maximum, scores -> 2^(s - max), rescale
    values    48 x d += P V          register tiles of rows x column vectors

The ragged kernel first packs the new keys into the transposed panels that pages hold anyway, and
the values head by head: rows of all heads side by side would fall into few sets of the L1 cache.
Scores are in log2 units.  A slot's number is its index among the slots of a sequence's page list
(ragged: among its new tokens); which slots a query sees is an interval.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from relax_passes.kernels.cpu import emit as e

from . import vector as v
from .config import PANEL, KVCacheConfig
from .functions import exp2, log2, soft_cap
from .merge import attending, store_lse
from .pages import match_pages, view_pages

ROWS = 48  # most queries of an item; a multiple of every register tile below
KEYS = 128  # keys of a block; a multiple of the page size or divided by it


def ragged_prefill(config: KVCacheConfig, target: v.VectorTarget) -> tirx.PrimFunc:
    """Build the kernel, with the arguments of TVM's ``batch_prefill_ragged_kv``.

    Arguments: q [n, heads, d], q_indptr int32 [b + 1], k and v [m, kv_heads, d], kv_indptr
    int32 [b + 1], two unused position arrays, output [n, heads, d], lse float32 [n, heads],
    causal, rotary_mode (must be 0), two unused rope scalars, sm_scale.  A negative sm_scale says
    that the layer slides: its magnitude is the scale, and queries see ``config.window`` keys.
    """
    return Prefill(config, target, paged=False).build()


def paged_prefill(config: KVCacheConfig, target: v.VectorTarget) -> tirx.PrimFunc:
    """Build the kernel, with the arguments of TVM's ``batch_prefill_paged_kv``.

    Arguments: q [n, heads, d], q_indptr int32 [b + 1], pages, page_indptr int32 [b + 1],
    page_values int32 [pages], length_info and the positions int32 [b] of first keys (as in decode),
    those of queries int32 [n], output [n, heads, d], lse float32 [n, heads], causal, rotary_mode
    (must be 0), two unused rope scalars, sm_scale (as in decode).  Queries of several sequences may
    be one entry's, which is then what these sequences share.
    """
    return Prefill(config, target, paged=True).build()


class Prefill:
    """Emits both kernels; the attributes are buffers and the variables of the current item."""

    lse: Any = None  # where log-sum-exps go, if anywhere
    size: Any = ROWS  # queries of a block

    def __init__(self, config: KVCacheConfig, target: v.VectorTarget, paged: bool) -> None:
        self.config, self.paged = config, paged
        self.d, self.page = config.head_dim, config.page_size
        self.columns = self.d // v.LANES
        # (rows, vectors) of the two register tiles; rows divide ROWS.
        if target.vectors >= 32:
            self.score_tile, value_rows, column_tile = (8, 2), 8, 2
        elif target.vectors >= 8:
            self.score_tile, value_rows, column_tile = (6, 1), 6, 1
        else:
            self.score_tile, value_rows, column_tile = (2, 1), 2, 1
        while self.columns % column_tile:
            column_tile -= 1
        self.value_tile = (value_rows, column_tile)

    def build(self) -> tirx.PrimFunc:
        """Build the kernel."""
        config, d = self.config, self.d
        heads, kv_heads = config.num_heads, config.num_kv_heads
        with IRBuilder() as builder:
            with T.prim_func():
                kind = "paged" if self.paged else "ragged"
                v.function(f"cpu_prefill_{kind}")
                keys = ("pages", "page_indptr", "page_values", "length_info")
                names = ("q", "q_indptr", *(keys if self.paged else ("k", "v", "kv_indptr")))
                positions = ("q_rope_position", "k_rope_pos_offset")
                names += (*(positions[::-1] if self.paged else positions), "output", "lse")
                handles = {n: T.arg(n, T.handle()) for n in names}
                self.causal = T.arg("causal", T.int32())
                rotary_mode, sm_scale = v.scalar_arguments()
                batch, n = T.int32(), T.int32()

                def index(name: str, *size):  # noqa: ANN002, ANN202
                    return T.match_buffer(handles[name], size, "int32", elem_offset=T.int32())

                self.q = T.match_buffer(handles["q"], (n, heads, d), config.dtype)
                self.q_indptr = index("q_indptr", batch + 1)
                if self.paged:
                    self.pages = match_pages(config, handles["pages"])
                    self.kv_indptr = index("page_indptr", batch + 1)
                    self.page_values = index("page_values", T.int32())
                    self.length_info = index("length_info", batch)
                else:
                    m = T.int32()
                    self.k = T.match_buffer(handles["k"], (m, kv_heads, d), config.dtype)
                    self.v = T.match_buffer(handles["v"], (m, kv_heads, d), config.dtype)
                    self.kv_indptr = index("kv_indptr", batch + 1)
                self.q_position = index("q_rope_position", n)
                self.k_position = index("k_rope_pos_offset", batch)
                self.output = T.match_buffer(handles["output"], (n, heads, d), config.dtype)
                self.lse = T.match_buffer(handles["lse"], (n, heads), "float32")
                if self.paged:
                    self.pages = view_pages(config, self.pages)
                e.require(rotary_mode == 0, v.NO_INLINE_ROPE)
                log2e = tirx.const(math.log2(math.e), "float32")
                self.scale = e.let(tirx.abs(sm_scale) * log2e, "scale")
                self.slides = sm_scale < 0
                if not self.paged:
                    panels = v.ceil_div(m, KEYS) * (KEYS // PANEL)
                    self.packed_k = v.scratch("packed_k", kv_heads, panels, PANEL * d)
                    self.packed_v = v.scratch("packed_v", kv_heads, m, d)
                with T.serial(0, batch) as b:
                    self._sequence(b)
            return builder.get()

    def _sequence(self, b: Expr) -> None:
        """Attend with all queries of one sequence."""
        config = self.config
        self.q_begin = e.let(self.q_indptr[b], "q_begin")
        self.q_len = e.let(self.q_indptr[b + 1] - self.q_begin, "q_len")
        self.kv_begin = e.let(self.kv_indptr[b], "kv_begin")
        count = e.let(self.kv_indptr[b + 1] - self.kv_begin, "count")
        if self.paged:
            self.last_page = e.let(tirx.max(count - 1, 0), "last_page")
            slots = (count - 1) * self.page + self.length_info[b]
            self.stop = v.opaque(tirx.Select(count > 0, slots, 0), "stop")
            if self.config.window:
                self.before = e.let(self.k_position[b] + self.config.window - 1, "before")
        else:
            self.stop = count
            panels = v.opaque(v.ceil_div(count, PANEL), "panels")
            with T.parallel(0, config.num_kv_heads * panels) as i:
                self._pack(v.div(i, panels), v.mod(i, panels))
        blocks = self._blocks()
        # Threads take consecutive items, and causal blocks cost more towards the end of the
        # sequence: first, last, second, last but one, ... gives every thread its share.
        with T.parallel(0, config.num_heads * blocks) as item:
            i = v.mod(item, blocks)
            block = tirx.Select(v.mod(i, 2) == 0, v.div(i, 2), blocks - 1 - v.div(i, 2))
            self._item(v.div(item, blocks), v.opaque(block, "block"))

    def _blocks(self) -> Expr:
        """Divide the queries into blocks; a few of them into two, so that two threads share them.

        How many keys a block walks shows in the last bits of its sums: blocks of many stay `ROWS`.
        """
        tile = self.score_tile[0]
        half = v.ceil_div(self.q_len, 2 * tile) * tile
        self.size = v.opaque(tirx.Select(self.q_len > ROWS, ROWS, tirx.max(half, tile)), "size")
        return v.opaque(v.ceil_div(self.q_len, self.size), "blocks")

    def _packed_head(self, h: Expr) -> Expr:
        """Where the packed keys and values of a head are among those of all."""
        return h

    def _pack(self, h: Expr, panel: Expr) -> None:
        """Pack 16 new tokens of one head; panel lanes beyond the sequence stay undefined."""
        place = self._packed_head(h)
        first = e.let(panel * PANEL, "first")
        with T.serial(0, tirx.min(self.stop - first, PANEL)) as t:
            row = e.let(self.kv_begin + first + t, "row")
            with T.serial(0, self.d) as i:
                key = v.load(self.k, [row, h, i], 1)
                T.buffer_store(self.packed_k, key, [place, panel, i * PANEL + t])
            with T.serial(0, self.columns) as c:
                value = v.load(self.v, [row, h, c * v.LANES])
                v.store(self.packed_v, value, [place, first + t, c * v.LANES])

    def _visible(self, row: Expr) -> tuple[Expr, Expr]:
        """First and one past the last slot that a query sees (an empty interval for none)."""
        high = tirx.Select(self.causal > 0, self.stop - self.q_len + row + 1, self.stop)
        if not self.config.window:
            return tirx.const(0, "int32"), high
        if self.paged:
            place = self.q_begin + tirx.min(row, self.q_len - 1)  # of rows that pad a tile, too
            low = tirx.max(self.q_position[place] - self.before, 0)
            return tirx.Select(self.slides, tirx.min(low, high), 0), high
        return tirx.Select(self.slides, tirx.max(high - self.config.window, 0), 0), high

    def _lowest(self, rows: Expr) -> Expr:
        """First slot that any query of the block sees."""
        if not (self.paged and self.config.window):
            return self._visible(self.row0)[0]
        found = v.counter("lowest")
        T.buffer_store(found, self.stop, [0])
        with T.serial(0, rows) as r:
            T.buffer_store(found, tirx.min(found[0], self._visible(self.row0 + r)[0]), [0])
        return found[0]

    def _item(self, head: Expr, block: Expr) -> None:
        """Attend with one block of queries of one head."""
        d = self.d
        self.head = e.let(head, "head")
        self.h = e.let(v.div(self.head, self.config.group), "h")
        self.place = self._packed_head(self.h)
        self.row0 = v.opaque(block * self.size, "row0")
        rows = v.opaque(tirx.min(self.q_len - self.row0, self.size), "rows")
        self.score_tiles = e.let(
            v.div(rows + self.score_tile[0] - 1, self.score_tile[0]), "score_tiles"
        )
        self.value_tiles = e.let(
            v.div(rows + self.value_tile[0] - 1, self.value_tile[0]), "value_tiles"
        )
        padded = v.opaque(self.score_tiles * self.score_tile[0], "padded")
        self.qs = v.scratch("q", ROWS * d)
        self.o = v.scratch("o", ROWS * d)
        self.s = v.scratch("s", ROWS * KEYS)
        self.m, self.alpha = v.scratch("m", ROWS), v.scratch("alpha", ROWS)
        self.l = v.scratch("l", ROWS, v.LANES)  # sums, in 16 interleaved parts
        for r in range(0, ROWS, v.LANES):
            v.store(self.m, v.const(v.EMPTY_LSE), [r])
        with T.serial(0, padded) as r:
            # Rows that pad the last tile repeat the last query; nothing of them is stored.
            row = e.let(self.q_begin + self.row0 + tirx.min(r, rows - 1), "row")
            v.store(self.l, v.const(0.0), [r, 0])
            for j in range(0, d, v.LANES):
                value = v.load(self.q, [row, self.head, j]) * v.splat(self.scale)
                v.store(self.qs, value, [r * d + j])
                v.store(self.o, v.const(0.0), [r * d + j])
        low = self._lowest(rows)
        _, high = self._visible(self.row0 + rows - 1)
        self.high = v.opaque(high, "high")
        first = v.opaque(v.div(low, KEYS), "first")
        last = v.div(self.high + KEYS - 1, KEYS)
        with T.serial(0, tirx.max(last - first, 0)) as i:
            self.slot0 = v.opaque((first + i) * KEYS, "slot0")
            self.keys = v.opaque(tirx.min(self.high - self.slot0, KEYS), "keys")
            width = self.score_tile[1] * PANEL
            self.groups = v.opaque(v.div(self.keys + width - 1, width), "groups")
            with T.serial(0, self.groups) as group, T.serial(0, self.score_tiles) as tile:
                self._scores(group, tile)
            with T.serial(0, padded) as r:
                self._softmax(r)
            with T.serial(0, self.value_tiles) as tile:
                for c in range(0, self.columns, self.value_tile[1]):
                    self._values(tile, c)
        self._finish(rows)

    def _page(self, slot: Expr) -> Expr:
        """Page of a slot; slots beyond the list read the last page and are masked."""
        index = tirx.min(v.div(slot, self.page), self.last_page)
        return e.let(self.page_values[self.kv_begin + index].astype("int64"), "page")

    def _scores(self, group: Expr, tile: Expr) -> None:
        """One register tile of Q K^T: rows x panels, channels in the loop."""
        rows, panels = self.score_tile
        row0 = v.opaque(tile * rows, "row0")
        places = []
        for p in range(panels):
            slot = e.let(self.slot0 + (group * panels + p) * PANEL, "slot")
            if self.paged:
                inside = v.div(v.mod(slot, self.page), PANEL)
                place = (self.pages, [self._page(slot), 0, self.h], inside * (PANEL * self.d))
            else:
                place = (self.packed_k, [self.place, v.div(slot, PANEL)], 0)
            places.append((place[0], place[1], e.let(tirx.convert(place[2]), "at")))
        acc = [[v.Register(v.const(0.0), "acc") for _ in range(panels)] for _ in range(rows)]
        with T.serial(0, self.d) as i:
            keys = [e.let(v.load(b, [*at, off + i * PANEL]), "key") for b, at, off in places]
            for r in range(rows):
                value = e.let(v.splat(self.qs[(row0 + r) * self.d + i]), "value")
                for p in range(panels):
                    acc[r][p].set(value * keys[p] + acc[r][p].get())
        for r in range(rows):
            for p in range(panels):
                at = (row0 + r) * KEYS + (group * panels + p) * PANEL
                v.store(self.s, soft_cap(acc[r][p].get(), self.config.soft_cap), [at])

    def _softmax(self, r: Expr) -> None:
        """Turn one row of scores into weights relative to the new maximum."""
        low, high = self._visible(self.row0 + r)
        low = v.opaque(low - self.slot0, "low")
        high = v.opaque(tirx.min(high, self.high) - self.slot0, "high")
        vectors = v.opaque(self.groups * self.score_tile[1], "vectors")
        top = v.Register(v.const(v.NEG_INF), "top")
        with T.If(tirx.And(low <= 0, high >= vectors * v.LANES)):
            with T.Then(), T.serial(0, vectors) as i:
                top.set(tirx.max(top.get(), v.load(self.s, [r * KEYS + i * v.LANES])))
            with T.Else(), T.serial(0, vectors) as i:
                lanes = T.Ramp(i * v.LANES, 1, v.LANES)
                seen = tirx.And(lanes < v.splat(high), lanes >= v.splat(low))
                score = v.load(self.s, [r * KEYS + i * v.LANES])
                score = e.let(tirx.Select(seen, score, v.const(v.NEG_INF)), "score")
                v.store(self.s, score, [r * KEYS + i * v.LANES])
                top.set(tirx.max(top.get(), score))
        m_old = e.let(v.splat(self.m[r]), "m_old")
        m_new = e.let(tirx.max(m_old, v.reduce_lanes(top.get(), tirx.max)), "m_new")
        alpha = e.let(exp2(m_old - m_new), "alpha")
        T.buffer_store(self.m, v.first_lane(m_new), [r])
        T.buffer_store(self.alpha, v.first_lane(alpha), [r])
        total = v.Register(v.load(self.l, [r, 0]) * alpha, "total")
        with T.serial(0, vectors) as i:
            weight = exp2(v.load(self.s, [r * KEYS + i * v.LANES]) - m_new)
            weight = e.let(weight, "weight")
            v.store(self.s, weight, [r * KEYS + i * v.LANES])
            total.set(total.get() + weight)
        v.store(self.l, total.get(), [r, 0])

    def _values(self, tile: Expr, c0: int) -> None:
        """One register tile of O = alpha O + P V: rows x column vectors, tokens in the loop.

        The loop ends with the last visible token: slots beyond it may hold anything, NaN too.
        """
        rows, columns = self.value_tile
        row0 = v.opaque(tile * rows, "row0")
        acc = []
        for r in range(rows):
            alpha = e.let(v.splat(self.alpha[row0 + r]), "alpha")
            at = [(row0 + r) * self.d + (c0 + c) * v.LANES for c in range(columns)]
            acc.append([v.Register(v.load(self.o, [a]) * alpha, "acc") for a in at])

        def token(t: Expr, buffer, outer: list, base) -> None:  # noqa: ANN001
            values = [
                e.let(v.load(buffer, [*outer, base + (c0 + c) * v.LANES]), "value")
                for c in range(columns)
            ]
            for r in range(rows):
                weight = e.let(v.splat(self.s[(row0 + r) * KEYS + t]), "weight")
                for c in range(columns):
                    acc[r][c].set(weight * values[c] + acc[r][c].get())

        if self.paged:
            step = min(self.page, KEYS)
            with T.serial(0, v.div(self.keys + step - 1, step)) as part:
                slot = e.let(self.slot0 + part * step, "slot")
                page = self._page(slot)
                inside = e.let(v.mod(slot, self.page), "inside")
                with T.serial(0, tirx.min(self.keys - part * step, step)) as t:
                    outer = [page, 1, self.h]
                    token(part * step + t, self.pages, outer, (inside + t) * self.d)
        else:
            with T.serial(0, self.keys) as t:
                token(t, self.packed_v, [self.place, self.slot0 + t], 0)
        for r in range(rows):
            for c in range(columns):
                at = (row0 + r) * self.d + (c0 + c) * v.LANES
                v.store(self.o, acc[r][c].get(), [at])

    def _finish(self, rows: Expr) -> None:
        """Normalize and store outputs and log-sum-exps; EMPTY_LSE and 0 where no key was seen."""
        total = v.scratch("total", ROWS)
        with T.serial(0, rows) as r:
            row_sum = v.reduce_lanes(v.load(self.l, [r, 0]), lambda a, b: a + b)
            T.buffer_store(total, v.first_lane(row_sum), [r])
        for r in range(0, ROWS, v.LANES):
            sums = e.let(v.load(total, [r]), "sums")
            safe = e.let(tirx.max(sums, v.const(1e-30)), "safe")
            lse = v.load(self.m, [r]) + log2(safe)
            lse = tirx.Select(sums <= v.const(0.0), v.const(v.EMPTY_LSE), lse)
            v.store(self.alpha, lse, [r])
            v.store(total, v.const(1.0) / safe, [r])
        with attending(self.config, self.head), T.serial(0, rows) as r:
            row = e.let(self.q_begin + self.row0 + r, "row")
            inverse = e.let(v.splat(total[r]), "inverse")
            for j in range(0, self.d, v.LANES):
                value = v.load(self.o, [r * self.d + j]) * inverse
                v.store(self.output, value, [row, self.head, j])
            if self.lse is not None:
                T.buffer_store(self.lse, self.alpha[r], [row, self.head])
            store_lse(self.config, self.output, row, self.head, self.alpha[r])
