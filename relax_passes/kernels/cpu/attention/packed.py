"""Attention inside each of several texts that lie one behind the other, without a cache.

The register tiles are those of the ragged prefill. An item here is one head of one text: it packs
its own keys and values and attends with all its blocks of queries, so that a batch of short texts
is one parallel region. A window looks to both sides where later keys are seen.
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
from .prefill import KEYS, ROWS, Prefill


def packed_attention(config: KVCacheConfig, target: v.VectorTarget, causal: bool) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments: q [n, heads, d], k and v [n, kv_heads, d], bounds int32 [texts + 1], output
    [n, heads, d], all of the cache's type.

    Parameters
    ----------
    config : KVCacheConfig
        Of one layer.
    target : VectorTarget
        Registers of the target.
    causal : bool
        Whether queries see no later keys.
    """
    return _Packed(config, target, causal).build()


class _Packed(Prefill):
    """Emits the kernel."""

    def __init__(self, config: KVCacheConfig, target: v.VectorTarget, causal: bool) -> None:
        super().__init__(config, target, paged=False)
        self.causal_only = causal

    def build(self) -> tirx.PrimFunc:
        """Build the kernel."""
        config, d = self.config, self.d
        heads, kv_heads = config.num_heads, config.num_kv_heads
        with IRBuilder() as builder:
            with T.prim_func():
                v.function("cpu_attention_packed")
                names = ("q", "k", "v", "bounds", "output")
                handles = {name: T.arg(name, T.handle()) for name in names}
                n, ends = T.int32(), T.int32()
                self.rows = n
                self.q = T.match_buffer(handles["q"], (n, heads, d), config.dtype)
                self.k = T.match_buffer(handles["k"], (n, kv_heads, d), config.dtype)
                self.v = T.match_buffer(handles["v"], (n, kv_heads, d), config.dtype)
                bounds = T.match_buffer(handles["bounds"], (ends,), "int32")
                self.output = T.match_buffer(handles["output"], (n, heads, d), config.dtype)
                log2e = math.log2(math.e)
                self.scale = tirx.const(config.specs[0].scale * log2e, "float32")
                texts = e.let(ends - 1, "texts")
                with T.parallel(0, texts * heads) as item:
                    text = e.let(v.div(item, heads), "text")
                    self._text(bounds[text], bounds[text + 1], v.mod(item, heads))
            return builder.get()

    def _text(self, begin: Expr, end: Expr, head: Expr) -> None:
        """Attend with one head of one text."""
        self.q_begin = self.kv_begin = e.let(begin, "begin")
        # As large as the longest text could be: an allocation in a parallel loop is moved to its
        # beginning, where the text's own length is not known yet.
        panels = v.ceil_div(self.rows, KEYS) * (KEYS // PANEL)
        self.packed_k = v.scratch("packed_k", 1, panels, PANEL * self.d)
        self.packed_v = v.scratch("packed_v", 1, self.rows, self.d)
        self.q_len = self.stop = v.opaque(end - self.q_begin, "stop")
        panels = v.opaque(v.ceil_div(self.stop, PANEL), "panels")
        group = e.let(v.div(head, self.config.group), "group")
        # What is no key is zero: leftover bits may be numbers that processors are slow with.
        wide = self.score_tile[1]
        padded = v.opaque(v.ceil_div(panels, wide) * wide, "padded")
        with T.serial(v.div(self.stop, PANEL), padded) as panel, T.serial(0, self.d) as i:
            v.store(self.packed_k, v.const(0.0), [0, panel, i * PANEL])
        with T.serial(0, panels) as panel:
            self._pack(group, panel)
        with T.serial(0, v.ceil_div(self.q_len, ROWS)) as block:
            self._item(head, v.opaque(block, "block"))

    def _packed_head(self, _h: Expr) -> Expr:
        return tirx.const(0, "int32")

    def _visible(self, row: Expr) -> tuple[Expr, Expr]:
        """First and one past the last key that a query sees."""
        window = self.config.window
        low, high = tirx.const(0, "int32"), self.stop
        if window:
            low = tirx.max(row - (window - 1), 0)
            high = tirx.min(row + window, self.stop)
        return low, tirx.min(row + 1, self.stop) if self.causal_only else high
