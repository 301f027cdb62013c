"""Attention whose four operands are 4-bit, as in the AMXFP4 paper: queries, keys, weights, values.

What is rounded, and in which groups of 32 (16 for NVFP4):

    queries, keys   along head_dim, after the rotary embedding; `split_rotary` does it
    weights P       along the context: softmax's numerator 2^(s - c), c the row's largest score
                    rounded up to an integer; the denominator is the unrounded sum
    values V        along the context, a group in every channel

Groups of the context start at positions that are multiples of 32. A query sees its last group only
up to itself, rounded as if padded with zeros: decoding a token gives what prefilling it gave, and
no scale knows the future. A pass that starts inside a group rounds the tokens before it and its own
apart. Since c is an integer, P's groups are rounded alike whichever keys a kernel sees: the runtime
may split the keys and merge the parts.

The cache holds unrounded values, because a group's scale changes until it is full. These kernels
exist for accuracy studies: they round all values again in every pass.
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
from .pages import match_pages, view_pages
from .rounding import GROUP, Rounding

_ARGUMENTS = {
    "ragged": ("q", "q_indptr", "k", "v", "kv_indptr", "q_rope_position", "k_rope_pos_offset"),
    "paged": ("q", "q_indptr", "pages", "page_indptr", "page_values", "length_info")
    + ("k_rope_pos_offset", "q_rope_position"),
    "decode": ("q", "pages", "page_indptr", "page_values", "length_info")
    + ("k_rope_pos_offset", "q_rope_position"),
}


def quantized_attention(config: KVCacheConfig, kind: str) -> tirx.PrimFunc:
    """Build a kernel.

    Parameters
    ----------
    config : KVCacheConfig
        With a format in ``quantize``, and no sliding layers.
    kind : str
        "ragged", "paged" or "decode": the arguments are those of ``ragged_prefill``,
        ``paged_prefill`` and ``decode_attention``.
    """
    return _Attention(config, kind).build()


class _Attention:
    """Emits the kernels; the attributes are buffers and the variables of the current item.

    A slot is a token's place in its sequence's groups: the index in the page list, or for new
    tokens the index among them plus the place of the first one in its group.
    """

    def __init__(self, config: KVCacheConfig, kind: str) -> None:
        self.config, self.kind = config, kind
        self.paged, self.d = kind != "ragged", config.head_dim
        self.columns = self.d // v.LANES
        self.rounding = Rounding(config.quantize)

    def build(self) -> tirx.PrimFunc:
        config, d = self.config, self.d
        with IRBuilder() as builder:
            with T.prim_func():
                v.function(f"cpu_quantized_{self.kind}")
                names = (*_ARGUMENTS[self.kind], "output", "lse")
                handles = {n: T.arg(n, T.handle()) for n in names}
                if self.kind != "decode":
                    self.causal = T.arg("causal", T.int32())
                rotary_mode, sm_scale = v.scalar_arguments()
                batch = T.int32()
                n = batch if self.kind == "decode" else T.int32()

                def index(name: str, size: Expr):  # noqa: ANN202
                    return T.match_buffer(handles[name], (size,), "int32", elem_offset=T.int32())

                self.q = T.match_buffer(handles["q"], (n, config.num_heads, d), config.dtype)
                if self.kind != "decode":
                    self.q_indptr = index("q_indptr", batch + 1)
                if self.paged:
                    self.pages = match_pages(config, handles["pages"])
                    self.kv_indptr = index("page_indptr", batch + 1)
                    pages = T.int32()
                    self.page_values = index("page_values", pages)
                    # Bounds of a sequence's slots by the arguments' shapes: TVM moves
                    # allocations up, to where nothing that was read is known.
                    self.most = pages * config.page_size
                    self.length_info = index("length_info", batch)
                else:
                    m, kv_heads = T.int32(), config.num_kv_heads
                    self.k = T.match_buffer(handles["k"], (m, kv_heads, d), config.dtype)
                    self.v = T.match_buffer(handles["v"], (m, kv_heads, d), config.dtype)
                    self.kv_indptr = index("kv_indptr", batch + 1)
                    self.most = (v.ceil_div(m, GROUP) + 1) * GROUP
                index("q_rope_position", n)
                self.position = index("k_rope_pos_offset", batch)
                shape = (n, config.num_heads, d)
                self.output = T.match_buffer(handles["output"], shape, config.dtype)
                self.lse = T.match_buffer(handles["lse"], (n, config.num_heads), "float32")
                if self.paged:
                    self.pages = view_pages(config, self.pages)
                e.require(rotary_mode == 0, v.NO_INLINE_ROPE)
                log2e = tirx.const(math.log2(math.e), "float32")
                self.scale = e.let(sm_scale * log2e, "scale")
                with T.serial(0, batch) as b:
                    self._sequence(b)
            return builder.get()

    def _sequence(self, b: Expr) -> None:
        """Round the values of one sequence, then attend with all of its queries."""
        kv_heads = self.config.num_kv_heads
        if self.kind == "decode":
            self.q_begin, self.q_len = b, tirx.const(1, "int32")
        else:
            self.q_begin = v.opaque(self.q_indptr[b], "q_begin")
            self.q_len = v.opaque(self.q_indptr[b + 1] - self.q_begin, "q_len")
        self.kv_begin = v.opaque(self.kv_indptr[b], "kv_begin")
        count = v.opaque(self.kv_indptr[b + 1] - self.kv_begin, "count")
        if self.paged:
            self.first = tirx.const(0, "int32")
            slots = (count - 1) * self.config.page_size + self.length_info[b]
            self.stop = v.opaque(tirx.Select(count > 0, slots, 0), "stop")
        else:
            self.first = v.opaque(v.mod(self.position[b], GROUP), "first")
            self.stop = v.opaque(self.first + count, "stop")
        groups = v.opaque(v.ceil_div(self.stop, GROUP), "groups")
        self.rounded = v.scratch("rounded", kv_heads, self.most, self.d)
        with T.parallel(0, kv_heads * groups) as i:
            h, group = v.opaque(v.div(i, groups), "h"), v.opaque(v.mod(i, groups), "group")
            self._round_values(h, group, self.stop, lambda t, c: [h, group * GROUP + t, c])
        with T.parallel(0, kv_heads * self.q_len) as i:
            self._item(v.opaque(v.div(i, kv_heads), "row"), v.opaque(v.mod(i, kv_heads), "h"))

    def _round_values(self, h: Expr, group: Expr, stop: Expr, place, into=None) -> None:  # noqa: ANN001
        """Round a group's values up to slot ``stop``; zeros stand for the slots outside."""
        rows = v.scratch("rows", GROUP * v.LANES)
        with T.serial(0, self.columns) as c:
            with T.serial(0, GROUP) as t:
                slot = v.opaque(group * GROUP + t, "slot")
                inside = tirx.And(slot >= self.first, slot < stop)
                with T.If(inside):
                    with T.Then():
                        v.store(rows, self._value(h, slot, c), [t * v.LANES])
                    with T.Else():
                        v.store(rows, v.const(0.0), [t * v.LANES])
            # One member after the other, because 32 vectors are more than the registers.
            for start in range(0, GROUP, self.rounding.size):
                size = self.rounding.size

                def member(t: Expr, start: int = start) -> Expr:
                    return v.load(rows, [(start + t) * v.LANES])

                scales = self.rounding.scales(size, member)
                with T.serial(0, size) as t:
                    element = self.rounding.element(v.hold(member(t), "value"), scales)
                    buffer = self.rounded if into is None else into
                    v.store(buffer, element, place(start + t, c * v.LANES))

    def _value(self, h: Expr, slot: Expr, c: Expr) -> Expr:
        """16 channels of a token's value."""
        if not self.paged:
            return v.load(self.v, [self.kv_begin + slot - self.first, h, c * v.LANES])
        inside = v.mod(slot, self.config.page_size)
        return v.load(self.pages, [self._page(slot), 1, h, inside * self.d + c * v.LANES])

    def _page(self, slot: Expr) -> Expr:
        index = self.kv_begin + v.div(slot, self.config.page_size)
        return e.let(self.page_values[index].astype("int64"), "page")

    def _item(self, row: Expr, h: Expr) -> None:
        """Attend with one query position and the heads that share keys and values."""
        group, d = self.config.group, self.d
        low, high = self.first, self.stop
        if self.kind == "ragged":
            own = self.stop - self.q_len + row + 1
            high = v.opaque(tirx.Select(self.causal > 0, own, self.stop), "high")
        last = v.opaque(v.div(high - 1, GROUP), "last")
        self.tail = None
        if self.kind == "ragged":
            # The query's last group, without the tokens that come after the query.
            self.tail = v.scratch("tail", GROUP * d)
            self._round_values(h, last, high, lambda t, c: [t * d + c], self.tail)
        self.qs, self.o = v.scratch("qs", d), v.scratch("o", d)
        self.s = v.scratch("s", self.most)
        with T.serial(0, group) as g:
            head = v.opaque(h * group + g, "head")
            at = e.let(self.q_begin + row, "at")
            with T.serial(0, self.columns) as c:
                query = v.load(self.q, [at, head, c * v.LANES]) * v.splat(self.scale)
                v.store(self.qs, query, [c * v.LANES])
                v.store(self.o, v.const(0.0), [c * v.LANES])
            top = v.Register(v.const(v.NEG_INF), "top")
            with T.serial(0, (last + 1) * (GROUP // PANEL)) as panel:
                self._scores(h, panel, low, high, top)
            best = v.reduce_lanes(top.get(), tirx.max)
            best = v.hold(tirx.ceil(tirx.max(best, v.const(v.EMPTY_LSE))), "best")
            total = v.Register(v.const(0.0), "total")
            with T.serial(0, last + 1) as i:
                self._weights(i, best, total)
                self._values(h, i, last)
            self._finish(at, head, best, total)

    def _scores(self, h: Expr, panel: Expr, low: Expr, high: Expr, top: v.Register) -> None:
        """Scores of 16 keys; those outside of [low, high) count as minus infinity."""
        slot = v.opaque(panel * PANEL, "slot")
        acc = v.Register(v.const(0.0), "acc")
        if self.paged:
            page = self._page(tirx.min(slot, self.stop - 1))
            inside = v.mod(slot, self.config.page_size)
            at = v.opaque(v.div(inside, PANEL) * (PANEL * self.d), "at")
            with T.serial(0, self.d) as i:
                key = v.load(self.pages, [page, 0, h, at + i * PANEL])
                acc.set(v.splat(self.qs[i]) * key + acc.get())
        else:
            keys = v.scratch("keys", PANEL)
            v.store(keys, v.const(0.0), [0])
            with T.serial(0, PANEL) as t, T.If(tirx.And(slot + t >= low, slot + t < high)):
                with T.Then():
                    part = v.Register(v.const(0.0), "part")
                    row = e.let(self.kv_begin + slot + t - self.first, "row")
                    with T.serial(0, self.columns) as c:
                        key = v.load(self.k, [row, h, c * v.LANES])
                        part.set(v.load(self.qs, [c * v.LANES]) * key + part.get())
                    score = v.reduce_lanes(part.get(), lambda a, b: a + b)
                    T.buffer_store(keys, v.first_lane(score), [t])
            acc.set(v.load(keys, [0]))
        score = v.hold(soft_cap(acc.get(), self.config.soft_cap), "score")
        lanes = T.Ramp(slot, 1, v.LANES)
        seen = tirx.And(lanes >= v.splat(low), lanes < v.splat(high))
        score = v.hold(tirx.Select(seen, score, v.const(v.NEG_INF)), "score")
        v.store(self.s, score, [slot])
        top.set(tirx.max(top.get(), score))

    def _weights(self, i: Expr, best: Expr, total: v.Register) -> None:
        """Turn a group's scores into rounded weights; `total` sums the unrounded ones."""
        weights = []
        for part in range(0, GROUP, v.LANES):
            score = v.load(self.s, [i * GROUP + part])
            weight = v.hold(exp2(v.hold(score - best, "under")), "weight")
            total.set(total.get() + weight)
            weights.append(weight)
        for part, weight in enumerate(self.rounding.along_lanes(weights)):
            v.store(self.s, weight, [i * GROUP + part * v.LANES])

    def _values(self, h: Expr, i: Expr, last: Expr) -> None:
        """Add a group's weighted values."""

        def add(buffer, place) -> None:  # noqa: ANN001
            acc = [v.Register(v.load(self.o, [c * v.LANES])) for c in range(self.columns)]
            with T.serial(0, GROUP) as t:
                weight = e.let(v.splat(self.s[i * GROUP + t]), "weight")
                for c, register in enumerate(acc):
                    value = v.load(buffer, place(t, c * v.LANES))
                    register.set(weight * value + register.get())
            for c, register in enumerate(acc):
                v.store(self.o, register.get(), [c * v.LANES])

        def whole() -> None:
            add(self.rounded, lambda t, c: [h, i * GROUP + t, c])

        if self.tail is None:
            whole()
            return
        with T.If(i < last):
            with T.Then():
                whole()
            with T.Else():
                add(self.tail, lambda t, c: [t * self.d + c])

    def _finish(self, at: Expr, head: Expr, best: Expr, total: v.Register) -> None:
        """Normalize and store the output and its log-sum-exp; 0 and EMPTY_LSE without keys."""
        summed = v.hold(v.reduce_lanes(total.get(), lambda a, b: a + b), "sum")
        safe = v.hold(tirx.max(summed, v.const(1e-30)), "safe")
        with T.serial(0, self.columns) as c:
            v.store(self.output, v.load(self.o, [c * v.LANES]) / safe, [at, head, c * v.LANES])
        lse = tirx.Select(summed <= v.const(0.0), v.const(v.EMPTY_LSE), best + log2(safe))
        T.buffer_store(self.lse, v.first_lane(e.let(lse, "lse")), [at, head])
