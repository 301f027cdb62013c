"""Attention of one new token per sequence over the paged cache ("flash decoding").

Work items are splits of the sequences' pages, about equally long.  An item walks its pages in
chunks of at least 64 tokens, three steps a chunk, for all heads:

    scores    s[h][t] = q[h] . k[t]      16 keys a vector, channels in the inner loop
    softmax   new maximum, rescale, s -> 2^(s - max), sum
    values    o[h] += s[h][t] * v[t]     channels in lanes, tokens in the inner loop

The query heads of a group share every load of K and V, and an item reads whole pages from front
to back, first the keys of all heads, then their values: one linear stream, which memory delivers
about twice as fast as the same blocks head by head.  Each item leaves an unnormalized output, its
maximum and its sum; a last pass merges the splits.  Scores are in log2 units.

Threads take runs of items, in the order of sequences: with sequences of like lengths a thread works
on the very run of them whose queries and keys it has made, and whose outputs it merges.
"""

from __future__ import annotations

import math

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

_CHUNK = 64  # tokens of a chunk where pages are shorter
_SPLIT_TOKENS = 64  # a split is at least this long
_ITEMS = 32  # splits are made until there are this many items
_SERIAL_BYTES = 640 * 1024  # a cache below this is read faster than other threads wake up
_PREFETCH_BYTES = 16384  # how far ahead of the stream to fetch


def decode_attention(config: KVCacheConfig, target: v.VectorTarget) -> tirx.PrimFunc:
    """Build the kernel, with the arguments of TVM's ``batch_decode_paged_kv``.

    Arguments: q [b, heads, d], pages, page_indptr int32 [b + 1], page_values int32 [pages],
    length_info int32 [b] (slots used in the last page), positions int32 [b] of the first key and of
    the query, output [b, heads, d], lse float32 [b, heads] (log2), rotary_mode (must be 0), two
    unused rope scalars, sm_scale.  A negative sm_scale says that the layer slides: its magnitude is
    the scale, and a query sees the keys of the last ``config.window`` positions, its own included.
    """
    return Decode(config, target).build()


class Decode:
    """Emits the kernel; the attributes are its buffers and the variables of the current item."""

    def __init__(self, config: KVCacheConfig, target: v.VectorTarget) -> None:
        self.config = config
        self.d, self.page = config.head_dim, config.page_size
        self.group = config.group
        self.chunk_pages = max(1, _CHUNK // self.page)
        self.chunk = self.chunk_pages * self.page
        self.columns = self.d // v.LANES
        # Register tiles: heads x interleaved partial sums for scores (8 chains of additions hide
        # the latency), heads x column vectors for values; 3/8 of the registers are for operands.
        budget = target.vectors * 5 // 8
        self.heads_tile = min(self.group, 8, budget)
        chains = self.heads_tile * v.LANES // target.lanes
        self.partial = 4 if chains <= 2 else 2 if chains <= 4 else 1
        fits = [c for c in range(1, self.columns + 1) if (self.heads_tile + 1) * c <= budget]
        self.column_tile = max([1] + [c for c in fits if self.columns % c == 0])

    def build(self) -> tirx.PrimFunc:
        """Build the kernel."""
        config, d = self.config, self.d
        with IRBuilder() as builder:
            with T.prim_func():
                v.function("cpu_decode")
                names = ["q", "pages", "page_indptr", "page_values", "length_info"]
                names += ["k_rope_pos_offset", "q_rope_position", "output", "lse"]
                handles = {n: T.arg(n, T.handle()) for n in names}
                rotary_mode, sm_scale = v.scalar_arguments()
                batch, nnz = T.int32(), T.int32()
                offsets = [T.int32() for _ in range(5)]
                shape = (batch, config.num_heads, d)
                self.q = T.match_buffer(handles["q"], shape, config.dtype)
                self.pages = match_pages(config, handles["pages"])

                def index(name: str, size, offset):  # noqa: ANN001, ANN202
                    return T.match_buffer(handles[name], size, "int32", elem_offset=offset)

                self.indptr = index("page_indptr", (batch + 1,), offsets[0])
                self.values = index("page_values", (nnz,), offsets[1])
                self.length_info = index("length_info", (batch,), offsets[2])
                self.k_position = index("k_rope_pos_offset", (batch,), offsets[3])
                self.q_position = index("q_rope_position", (batch,), offsets[4])
                output = T.match_buffer(handles["output"], shape, config.dtype)
                lse = T.match_buffer(handles["lse"], (batch, config.num_heads), "float32")
                self.pages = view_pages(config, self.pages)
                e.require(rotary_mode == 0, v.NO_INLINE_ROPE)
                self._body(batch, nnz, sm_scale, output, lse)
            return builder.get()

    def _body(self, batch: Expr, nnz: Expr, sm_scale: Expr, output, lse) -> None:  # noqa: ANN001
        config = self.config
        width = 2 if config.dtype == "float16" else 4
        self.ahead = _PREFETCH_BYTES // width
        page_bytes = 2 * config.num_kv_heads * config.block * width
        # Pages of an item: so many that there are about as many items as wanted.
        least = v.ceil_div(tirx.const(_SPLIT_TOKENS, "int32"), self.page)
        self.slides = sm_scale < 0
        pages = self._seen_pages(batch) if config.window else nnz
        self.per_item = v.opaque(tirx.max(v.ceil_div(pages, _ITEMS), least), "per_item")
        self.scale = e.let(tirx.abs(sm_scale) * tirx.const(math.log2(math.e), "float32"), "scale")
        self.batch = batch
        # Sized by a bound of the items: TVM moves allocations up, before they are known.
        most = batch + _ITEMS
        self._allocate_parts(most)
        items = e.let(self._items_before(batch), "items")
        alone = tirx.And(pages * page_bytes <= _SERIAL_BYTES, batch < v.FEW_TOKENS)
        self._run(alone, items, batch, output, lse)

    def _allocate_parts(self, most: Expr) -> None:
        """Make room for what ``most`` items leave to be merged."""
        heads = self.config.num_heads
        self.part_o = v.scratch("part_o", most, heads, self.d)
        self.part_m, self.part_l = (v.scratch(n, most, heads) for n in ("part_m", "part_l"))

    def _run(self, alone: Expr, items: Expr, count: Expr, output, lse) -> None:  # noqa: ANN001
        """Attend with all items and merge ``count`` sequences, on one thread or on all."""
        with T.If(alone):
            with T.Then():
                with T.serial(0, items) as item:
                    self._item(item)
                with T.serial(0, count) as b:
                    self._merge_heads(b, output, lse)
            with T.Else(), e.region():
                with e.barrier_behind(), T.parallel(0, items) as item:
                    self._item(item)
                with T.parallel(0, count) as b:
                    self._merge_heads(b, output, lse)

    def _low(self, b: Expr) -> Expr:
        """First slot that a query sees; a fork's keys are several lists with a position each."""
        low = self.q_position[b] + 1 - self.config.window - self.k_position[b]
        return tirx.Select(self.slides, tirx.max(low, 0), 0)

    def _pages_before(self, b: Expr) -> Expr | int:
        """Pages of a sequence in front of what its query sees."""
        if not self.config.window:
            return 0
        return tirx.min(v.div(self._low(b), self.page), self.indptr[b + 1] - self.indptr[b])

    def _seen_pages(self, batch: Expr) -> Expr:
        """Pages of all sequences that are not in front of what their queries see."""
        total = v.counter("seen")
        with T.serial(0, batch) as b:
            count = self.indptr[b + 1] - self.indptr[b] - self._pages_before(b)
            T.buffer_store(total, total[0] + count, [0])
        return e.let(total[0], "seen_pages")

    def _splits(self, b: Expr) -> Expr:
        """Items of a sequence."""
        count = self.indptr[b + 1] - self.indptr[b] - self._pages_before(b)
        return v.ceil_div(count, self.per_item)

    def _items_before(self, b: Expr) -> Expr:
        """Items of the sequences in front of one."""
        total = v.counter("before")
        with T.serial(0, b) as other:
            T.buffer_store(total, total[0] + self._splits(other), [0])
        return total[0]

    def _find(self, item: Expr) -> tuple[Expr, Expr]:
        """Sequence of an item, and which of its splits it is."""
        total, sequence, first = (v.counter(n) for n in ("total", "sequence", "first"))
        with T.serial(0, self.batch) as b:
            with T.If(total[0] <= item), T.Then():
                T.buffer_store(sequence, b, [0])
                T.buffer_store(first, total[0], [0])
            T.buffer_store(total, total[0] + self._splits(b), [0])
        return e.let(sequence[0], "b"), e.let(item - first[0], "split")

    def _merge_heads(self, b: Expr, output, lse) -> None:  # noqa: ANN001
        """Combine the splits of one sequence."""
        self.first, self.splits = e.let(self._items_before(b), "first"), self._splits(b)
        with T.serial(0, self.config.num_heads) as h, attending(self.config, h):
            self._merge(b, h, output, lse)

    def _item(self, item: Expr) -> None:
        """Attend to one split of one sequence."""
        heads, page = self.config.num_heads, self.page
        b, split = self._find(item)
        self.begin = e.let(self.indptr[b], "begin")
        count = e.let(self.indptr[b + 1] - self.begin, "count")
        first = v.opaque(self._pages_before(b) + split * self.per_item, "first")
        last = v.opaque(tirx.min(first + self.per_item, count), "last")
        last_page_len = self.length_info[b]
        self.stop = v.opaque((count - 1) * page + last_page_len, "stop")  # slots of the sequence
        self.start = v.opaque(self._low(b), "start") if self.config.window else None

        self._allocate_item()
        self._start(b)
        with T.serial(0, v.ceil_div(last - first, self.chunk_pages)) as c:
            self.base = v.opaque(first + c * self.chunk_pages, "base")
            here = v.opaque(tirx.min(last - self.base, self.chunk_pages), "here")
            with T.serial(0, here) as j:
                self._scores(j)
            slots = tirx.min(self.stop - self.base * page, here * page)
            self.used = v.opaque(v.ceil_div(slots, v.LANES), "used")  # vectors of scores
            with T.serial(0, heads) as h:
                self._softmax(h)
            with T.serial(0, here) as j:
                self._values(j)

        self._leave(item)

    def _allocate_item(self) -> None:
        """Make room for an item's queries, outputs, scores and sums."""
        heads, d = self.config.num_heads, self.d
        self.qs, self.o = v.scratch("qs", heads, d), v.scratch("o", heads, d)
        self.s = v.scratch("s", heads, self.chunk)
        # Maximum, sum (of 16 interleaved parts) and the chunk's maximum, as vectors.
        self.m, self.l, self.top = (v.scratch(n, heads, v.LANES) for n in ("m", "l", "top"))

    def _start(self, b: Expr) -> None:
        """Begin an item of sequence ``b``: its queries, scaled, and empty sums."""
        with T.serial(0, self.config.num_heads) as h:
            v.store(self.m, v.const(v.EMPTY_LSE), [h, 0])
            v.store(self.l, v.const(0.0), [h, 0])
            v.store(self.top, v.const(v.NEG_INF), [h, 0])
            with T.serial(0, self.columns) as c:
                row = v.load(self.q, [b, h, c * v.LANES])
                v.store(self.qs, row * v.splat(self.scale), [h, c * v.LANES])
                v.store(self.o, v.const(0.0), [h, c * v.LANES])

    def _leave(self, item: Expr) -> None:
        """Store an item's outputs, maxima and sums for the merge."""
        with T.serial(0, self.config.num_heads) as h:
            with T.serial(0, self.columns) as c:
                v.store(self.part_o, v.load(self.o, [h, c * v.LANES]), [item, h, c * v.LANES])
            T.buffer_store(self.part_m, self.m[h, 0], [item, h])
            total = v.reduce_lanes(v.load(self.l, [h, 0]), lambda a, b: a + b)
            T.buffer_store(self.part_l, v.first_lane(total), [item, h])

    def _page(self, j: Expr) -> tuple[Expr, Expr]:
        """Number and first slot of a page of the chunk."""
        page = e.let(self.values[self.begin + self.base + j].astype("int64"), "page")
        return page, v.opaque((self.base + j) * self.page, "slot")

    def _tiles(self, size: int, total: int) -> list[range]:
        """Consecutive ranges that cover 0 .. total."""
        return [range(i, min(i + size, total)) for i in range(0, total, size)]

    def _scores(self, j: Expr) -> None:
        """Scores of one page's keys, for all heads."""
        page, slot0 = self._page(j)
        filled = v.ceil_div(tirx.min(self.stop - slot0, self.page), PANEL)
        panels = v.opaque(filled, "panels")
        with T.serial(0, self.config.num_kv_heads) as h, T.serial(0, panels) as panel:
            head0 = v.opaque(h * self.group, "head0")
            slot = v.opaque(slot0 + panel * PANEL, "slot")
            for tile in self._tiles(self.heads_tile, self.group):
                sums = {
                    (g, p): v.Register(v.const(0.0), "acc")
                    for g in tile
                    for p in range(self.partial)
                }
                with T.serial(0, self.d // self.partial) as i:
                    for p in range(self.partial):
                        channel = i * self.partial + p
                        at = panel * (PANEL * self.d) + channel * PANEL
                        if tile.start == 0:
                            e.prefetch(self.pages, page, 0, h, at + self.ahead)
                        key = e.let(v.load(self.pages, [page, 0, h, at]), "key")
                        for g in tile:
                            acc = sums[g, p]
                            query = v.splat(self.qs[head0 + g, channel])
                            acc.set(query * key + acc.get())
                for g in tile:
                    score = sums[g, 0].get()
                    for p in range(1, self.partial):
                        score = score + sums[g, p].get()
                    score = soft_cap(score, self.config.soft_cap)
                    seen = T.Ramp(slot, 1, v.LANES) < v.splat(self.stop)
                    if self.config.window:
                        seen = tirx.And(seen, T.Ramp(slot, 1, v.LANES) >= v.splat(self.start))
                    score = e.let(tirx.Select(seen, score, v.const(v.NEG_INF)), "score")
                    v.store(self.s, score, [head0 + g, j * self.page + panel * PANEL])
                    top = tirx.max(v.load(self.top, [head0 + g, 0]), score)
                    v.store(self.top, top, [head0 + g, 0])

    def _softmax(self, h: Expr) -> None:
        """Turn one head's scores of the chunk into weights relative to the new maximum."""
        m_old = e.let(v.load(self.m, [h, 0]), "m_old")
        top = v.reduce_lanes(v.load(self.top, [h, 0]), tirx.max)
        m_new = v.hold(tirx.max(m_old, top), "m_new")
        alpha = v.hold(exp2(m_old - m_new), "alpha")
        v.store(self.m, m_new, [h, 0])
        v.store(self.top, v.const(v.NEG_INF), [h, 0])
        total = v.Register(v.load(self.l, [h, 0]) * alpha, "total")
        with T.serial(0, self.used) as i:
            weight = v.hold(exp2(v.load(self.s, [h, i * v.LANES]) - m_new), "weight")
            v.store(self.s, weight, [h, i * v.LANES])
            total.set(total.get() + weight)
        v.store(self.l, total.get(), [h, 0])
        with T.serial(0, self.columns) as c:
            v.store(self.o, v.load(self.o, [h, c * v.LANES]) * alpha, [h, c * v.LANES])

    def _values(self, j: Expr) -> None:
        """Add one page's weighted values, for all heads."""
        page, slot = self._page(j)
        # Slots that hold no token may hold NaN, so the loop ends with the tokens.
        end = v.opaque(tirx.min(self.stop - slot, self.page), "end")
        low = v.opaque(tirx.max(self.start - slot, 0), "low") if self.config.window else 0
        with T.serial(0, self.config.num_kv_heads) as h:
            head0 = v.opaque(h * self.group, "head0")
            for tile in self._tiles(self.heads_tile, self.group):
                for columns in self._tiles(self.column_tile, self.columns):
                    acc = {
                        (g, c): v.Register(v.load(self.o, [head0 + g, c * v.LANES]), "acc")
                        for g in tile
                        for c in columns
                    }
                    with T.serial(0, end - low) as i:
                        t = i + low
                        rows = []
                        for c in columns:
                            at = t * self.d + c * v.LANES
                            rows.append(e.let(v.load(self.pages, [page, 1, h, at]), "row"))
                            if tile.start == 0:
                                e.prefetch(self.pages, page, 1, h, at + self.ahead)
                        for g in tile:
                            weight = self.s[head0 + g, j * self.page + t]
                            weight = e.let(v.splat(weight), "weight")
                            for c, row in zip(columns, rows, strict=True):
                                acc[g, c].set(weight * row + acc[g, c].get())
                    for (g, c), register in acc.items():
                        v.store(self.o, register.get(), [head0 + g, c * v.LANES])

    def _merge(self, b: Expr, h: Expr, output, lse) -> None:  # noqa: ANN001
        """Combine the splits of one head: o = sum o_i 2^(m_i - m) / sum l_i 2^(m_i - m)."""
        top = v.Register(v.const(v.EMPTY_LSE), "top")
        with T.serial(0, self.splits) as i:
            top.set(tirx.max(top.get(), v.splat(self.part_m[self.first + i, h])))
        m = e.let(top.get(), "m")
        total = v.Register(v.const(0.0), "total")
        acc = [v.Register(v.const(0.0), "acc") for _ in range(self.columns)]
        with T.serial(0, self.splits) as i:
            weight = e.let(exp2(v.splat(self.part_m[self.first + i, h]) - m), "weight")
            total.set(total.get() + weight * v.splat(self.part_l[self.first + i, h]))
            for c, register in enumerate(acc):
                row = v.load(self.part_o, [self.first + i, h, c * v.LANES])
                register.set(register.get() + weight * row)
        # No key at all: l = 0, output 0, log-sum-exp EMPTY_LSE.
        safe = e.let(tirx.max(total.get(), v.const(1e-30)), "safe")
        inverse = e.let(v.const(1.0) / safe, "inverse")
        for c, register in enumerate(acc):
            v.store(output, register.get() * inverse, [b, h, c * v.LANES])
        empty = total.get() <= v.const(0.0)
        value = tirx.Select(empty, v.const(v.EMPTY_LSE), m + log2(safe))
        single = e.let(v.first_lane(e.let(value, "value")), "single")
        T.buffer_store(lse, single, [b, h])
        store_lse(self.config, output, b, h, single)
