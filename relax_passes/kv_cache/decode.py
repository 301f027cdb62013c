"""Attention of one new token per sequence over the paged cache ("flash decoding").

Work items are (sequence, key/value head, split of the sequence's pages).  An item walks its pages
in chunks, three steps a chunk, for all query heads of the group at once, so that K and V are read
once:

    scores    s[g][t] = q[g] . k[t]      16 keys a vector, channels in the inner loop
    softmax   new maximum, rescale, s -> 2^(s - max), sum
    values    o[g] += s[g][t] * v[t]     channels in lanes, tokens in the inner loop

Memory is kept busy through all steps by prefetching for the next but one: the score step fetches
the chunk's values, the value step the next chunk's keys.  Each item leaves an unnormalized
output, its maximum and its sum; a last pass merges the splits.  Scores are in log2 units.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from . import vector as v
from .config import PANEL, KVCacheConfig
from .pages import match_pages, view_pages

_CHUNK = 64  # tokens of a chunk: 512 bytes of scores a head stay on the stack
_SPLIT_TOKENS = 128  # a split is at least this long
_ITEMS = 16  # splits are made until there are this many items
_SERIAL_BYTES = 96 * 1024  # a cache below this is read faster than other threads wake up


def decode_attention(
    config: KVCacheConfig, target: v.VectorTarget, sliding: bool = False
) -> tirx.PrimFunc:
    """Build the kernel, with the arguments of TVM's ``batch_decode_paged_kv``.

    Arguments: q [b, heads, d], pages, page_indptr int32 [b + 1], page_values int32 [pages],
    length_info int32 [b] (slots used in the last page) or, when sliding, [3, b] (that, the first
    slot used in the first page, 0), two unused position arrays int32 [b], output [b, heads, d],
    lse float32 [b, heads] (log2), rotary_mode (must be 0), two unused rope scalars, sm_scale.
    """
    return _Decode(config, target, sliding).build()


class _Decode:
    """Emits the kernel; the attributes are its buffers and the variables of the current item."""

    def __init__(self, config: KVCacheConfig, target: v.VectorTarget, sliding: bool) -> None:
        self.config = config
        self.sliding = sliding
        self.d, self.page = config.head_dim, config.page_size
        self.group = config.group
        self.chunk_pages = max(1, _CHUNK // self.page)
        self.chunk = self.chunk_pages * self.page
        self.columns = self.d // v.LANES
        # Register tiles: heads x interleaved partial sums for scores, heads x column vectors for
        # values, leaving registers for the operands.
        budget = max(2, target.vectors - max(2, target.vectors // 6))
        self.heads_tile = min(self.group, 8, budget)
        self.partial = max(1, min(4, 8 // self.heads_tile, budget // self.heads_tile))
        self.column_tile = max(
            c
            for c in range(1, self.columns + 1)
            if self.columns % c == 0 and (c == 1 or self.heads_tile * c <= budget - c)
        )

    def build(self) -> tirx.PrimFunc:
        config, d = self.config, self.d
        with IRBuilder() as builder:
            with T.prim_func():
                T.func_name("cpu_decode_sliding" if self.sliding else "cpu_decode")
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                names = ("q", "pages", "page_indptr", "page_values", "length_info")
                names += ("k_rope_pos_offset", "q_rope_position", "output", "lse")
                handles = {n: T.arg(n, T.handle()) for n in names}
                rotary_mode = T.arg("rotary_mode", T.int32())
                T.arg("rope_scale", T.float32())
                T.arg("rope_theta", T.float32())
                sm_scale = T.arg("sm_scale", T.float32())
                batch, nnz = T.int32(), T.int32()
                offsets = [T.int32() for _ in range(5)]
                shape = (batch, config.num_heads, d)
                self.q = T.match_buffer(handles["q"], shape, config.dtype)
                self.pages = match_pages(config, handles["pages"])

                def index(name: str, size, offset):  # noqa: ANN001, ANN202
                    return T.match_buffer(handles[name], size, "int32", elem_offset=offset)

                self.indptr = index("page_indptr", (batch + 1,), offsets[0])
                self.values = index("page_values", (nnz,), offsets[1])
                info = (3, batch) if self.sliding else (batch,)
                self.length_info = index("length_info", info, offsets[2])
                index("k_rope_pos_offset", (batch,), offsets[3])
                index("q_rope_position", (batch,), offsets[4])
                output = T.match_buffer(handles["output"], shape, config.dtype)
                lse = T.match_buffer(handles["lse"], (batch, config.num_heads), "float32")
                self.pages = view_pages(config, self.pages)
                v.require(rotary_mode == 0, v.NO_INLINE_ROPE)
                self._body(batch, nnz, sm_scale, output, lse)
            return builder.get()

    def _body(self, batch: Expr, nnz: Expr, sm_scale: Expr, output, lse) -> None:  # noqa: ANN001
        kv_heads = self.config.num_kv_heads
        width = 2 if self.config.dtype == "float16" else 4
        page_bytes = 2 * kv_heads * self.config.block * width
        by_items = -(-_ITEMS // kv_heads)
        wanted = tirx.indexdiv(tirx.max(batch, by_items) + batch - 1, batch)
        longest = tirx.indexdiv(nnz * self.page, batch * _SPLIT_TOKENS)
        self.splits = v.bind(tirx.max(tirx.min(wanted, longest), 1), "splits")
        self.scale = v.bind(tirx.abs(sm_scale) * tirx.const(math.log2(math.e), "float32"), "scale")
        self.items = v.bind(batch * (kv_heads * self.splits), "items")
        name = IRBuilder.name
        self.part_o = name("part_o", T.alloc_buffer((self.items, self.group, self.d), "float32"))
        self.part_m = name("part_m", T.alloc_buffer((self.items, self.group), "float32"))
        self.part_l = name("part_l", T.alloc_buffer((self.items, self.group), "float32"))
        with T.If(nnz * page_bytes <= _SERIAL_BYTES):
            with T.Then(), T.serial(0, self.items) as item:
                self._item(item)
            with T.Else(), T.parallel(0, self.items) as item:
                self._item(item)
        with T.serial(0, batch) as b, T.serial(0, kv_heads) as h, T.serial(0, self.group) as g:
            self._merge(b, h, g, output, lse)

    def _item(self, item: Expr) -> None:
        """Attend to one split of one sequence with one group of heads."""
        kv_heads, page, d = self.config.num_kv_heads, self.page, self.d
        b = v.bind(tirx.indexdiv(item, self.splits * kv_heads), "b")
        self.h = v.bind(tirx.indexmod(tirx.indexdiv(item, self.splits), kv_heads), "h")
        split = tirx.indexmod(item, self.splits)
        self.begin = v.bind(self.indptr[b], "begin")
        count = v.bind(self.indptr[b + 1] - self.begin, "count")
        per_split = v.bind(tirx.indexdiv(count + self.splits - 1, self.splits), "per_split")
        first = v.bind(tirx.min(split * per_split, count), "first")
        self.last = v.bind(tirx.min(first + per_split, count), "last")
        last_page_len = self.length_info[0, b] if self.sliding else self.length_info[b]
        self.stop = v.bind((count - 1) * page + last_page_len, "stop")  # slots of the sequence
        self.start = v.bind(self.length_info[1, b], "start") if self.sliding else None

        self.qs = [v.scratch(d, "q") for _ in range(self.group)]
        self.s = [v.scratch(self.chunk, "s") for _ in range(self.group)]
        self.o = [v.scratch(d, "o") for _ in range(self.group)]
        self.m = [v.Register(v.const(v.EMPTY_LSE), "m") for _ in range(self.group)]
        self.l = [v.Register(v.const(0.0), "l") for _ in range(self.group)]
        self.alpha = [v.Register(v.const(0.0), "alpha") for _ in range(self.group)]
        for g in range(self.group):
            for j in range(0, d, v.LANES):
                row = v.load(self.q, [b, self.h * self.group + g, j])
                v.store(self.qs[g], row * v.splat(self.scale), [j])
                v.store(self.o[g], v.const(0.0), [j])

        chunks = tirx.indexdiv(self.last - first + self.chunk_pages - 1, self.chunk_pages)
        with T.serial(0, chunks) as c:
            self.base = v.bind(first + c * self.chunk_pages, "base")
            here = v.bind(tirx.min(self.last - self.base, self.chunk_pages), "here")
            top = [v.Register(v.const(v.NEG_INF), "top") for _ in range(self.group)]
            with T.serial(0, here) as j:
                self._scores(j, top)
            for g in range(self.group):
                self._softmax(g, here, top[g])
            with T.serial(0, here) as j:
                self._values(j)

        for g in range(self.group):
            for j in range(0, d, v.LANES):
                v.store(self.part_o, v.load(self.o[g], [j]), [item, g, j])
            T.buffer_store(self.part_m, v.first_lane(self.m[g].get()), [item, g])
            total = v.reduce_lanes(self.l[g].get(), lambda a, b: a + b)
            T.buffer_store(self.part_l, v.first_lane(total), [item, g])

    def _page(self, index: Expr) -> Expr:
        """Number of the page at an index of the sequence's page list."""
        return v.bind(self.values[self.begin + index].astype("int64"), "page")

    def _scores(self, j: Expr, top: list[v.Register]) -> None:
        """Scores of one page's keys for all heads of the group; fetch the page's values."""
        page = self._page(self.base + j)
        for panel in range(self.page // PANEL):
            for g0 in range(0, self.group, self.heads_tile):
                heads = range(g0, min(g0 + self.heads_tile, self.group))
                sums = {
                    (g, p): v.Register(v.const(0.0), "acc")
                    for g in heads
                    for p in range(self.partial)
                }
                with T.serial(0, self.d // self.partial) as i:
                    for p in range(self.partial):
                        channel = i * self.partial + p
                        at = panel * PANEL * self.d + channel * PANEL
                        if g0 == 0:
                            v.prefetch(self.pages, [page, 1, self.h, at])
                        key = v.bind(v.load(self.pages, [page, 0, self.h, at]), "key")
                        for g in heads:
                            acc = sums[g, p]
                            acc.set(v.fma(v.splat(self.qs[g][channel]), key, acc.get()))
                slot = v.bind((self.base + j) * self.page + panel * PANEL, "slot")
                lanes = T.Ramp(slot, 1, v.LANES)
                seen = lanes < v.splat(self.stop)
                if self.sliding:
                    seen = tirx.And(seen, lanes >= v.splat(self.start))
                for g in heads:
                    score = sums[g, 0].get()
                    for p in range(1, self.partial):
                        score = score + sums[g, p].get()
                    score = v.bind(tirx.Select(seen, score, v.const(v.NEG_INF)), "score")
                    v.store(self.s[g], score, [j * self.page + panel * PANEL])
                    top[g].set(tirx.max(top[g].get(), score))

    def _softmax(self, g: int, here: Expr, top: v.Register) -> None:
        """Turn one head's scores of the chunk into weights relative to the new maximum."""
        m_old = v.bind(self.m[g].get(), "m_old")
        m_new = v.bind(tirx.max(m_old, v.reduce_lanes(top.get(), tirx.max)), "m_new")
        alpha = v.bind(v.exp2(m_old - m_new), "alpha")
        self.alpha[g].set(alpha)
        self.m[g].set(m_new)
        self.l[g].set(self.l[g].get() * alpha)
        with T.serial(0, here * (self.page // v.LANES)) as i:
            weight = v.bind(v.exp2(v.load(self.s[g], [i * v.LANES]) - m_new), "weight")
            v.store(self.s[g], weight, [i * v.LANES])
            self.l[g].set(self.l[g].get() + weight)
        for j in range(0, self.d, v.LANES):
            v.store(self.o[g], v.load(self.o[g], [j]) * alpha, [j])

    def _values(self, j: Expr) -> None:
        """Add one page's weighted values; fetch the keys of the page one chunk further on."""
        page = self._page(self.base + j)
        ahead = tirx.min(self.base + j + self.chunk_pages, self.last - 1)
        next_page = self._page(ahead)
        slot = v.bind((self.base + j) * self.page, "slot")
        end = v.bind(tirx.min(self.stop - slot, self.page), "end")
        low = v.bind(tirx.max(self.start - slot, 0), "low") if self.sliding else 0
        for g0 in range(0, self.group, self.heads_tile):
            heads = range(g0, min(g0 + self.heads_tile, self.group))
            for c0 in range(0, self.columns, self.column_tile):
                columns = range(c0, c0 + self.column_tile)
                acc = {
                    (g, c): v.Register(v.load(self.o[g], [c * v.LANES]), "acc")
                    for g in heads
                    for c in columns
                }
                # Slots that hold no token may hold NaN, so the loop ends with the tokens.
                with T.serial(0, end - low) as i:
                    t = i + low
                    rows = [
                        v.bind(v.load(self.pages, [page, 1, self.h, t * self.d + c * v.LANES]))
                        for c in columns
                    ]
                    if g0 == 0:
                        for c in columns:
                            at = [next_page, 0, self.h, t * self.d + c * v.LANES]
                            v.prefetch(self.pages, at)
                    for g in heads:
                        weight = v.bind(v.splat(self.s[g][j * self.page + t]), "weight")
                        for c, row in zip(columns, rows, strict=True):
                            acc[g, c].set(v.fma(weight, row, acc[g, c].get()))
                for (g, c), register in acc.items():
                    v.store(self.o[g], register.get(), [c * v.LANES])

    def _merge(self, b: Expr, h: Expr, g: Expr, output, lse) -> None:  # noqa: ANN001
        """Combine the splits of one head: o = sum o_i 2^(m_i - m) / sum l_i 2^(m_i - m)."""
        item = v.bind((b * self.config.num_kv_heads + h) * self.splits, "item")
        top = v.Register(v.const(v.EMPTY_LSE), "top")
        with T.serial(0, self.splits) as i:
            top.set(tirx.max(top.get(), v.splat(self.part_m[item + i, g])))
        m = v.bind(top.get(), "m")
        total = v.Register(v.const(0.0), "total")
        acc = [v.Register(v.const(0.0), "acc") for _ in range(self.columns)]
        with T.serial(0, self.splits) as i:
            weight = v.bind(v.exp2(v.splat(self.part_m[item + i, g]) - m), "weight")
            total.set(total.get() + weight * v.splat(self.part_l[item + i, g]))
            for c, register in enumerate(acc):
                row = v.load(self.part_o, [item + i, g, c * v.LANES])
                register.set(register.get() + weight * row)
        # No key at all: l = 0, output 0, log-sum-exp EMPTY_LSE.
        safe = v.bind(tirx.max(total.get(), v.const(1e-30)), "safe")
        inverse = v.bind(v.const(1.0) / safe, "inverse")
        head = h * self.group + g
        for c, register in enumerate(acc):
            v.store(output, register.get() * inverse, [b, head, c * v.LANES])
        empty = total.get() <= v.const(0.0)
        value = tirx.Select(empty, v.const(v.EMPTY_LSE), m + v.log2(safe))
        T.buffer_store(lse, v.first_lane(v.bind(value, "value")), [b, head])
