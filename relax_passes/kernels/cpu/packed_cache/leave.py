"""The first kernel of a step: what is no longer among the newest is rounded into its page.

Of all layers at once and in front of all else, so that a pass that fails behind it leaves pages
with every token that is not in 16 bits. What comes and leaves in one step is rounded behind its
layer's attention (`round_rows`).

Keys of a page are stored less a mean, where the cache is centred: that of the tokens which are in
16 bits when the page's first one leaves them. In steps of one token these are the page's own first
ones, `newest` of them; behind a page's begin in the middle of a prompt, those of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.attention import vector as v

from .codes import Codes
from .layout import BEFORE, EXACT, PAGE, PLACE, Layout, Step
from .layout import ROWS as COUNT
from .pages import Pages

Take = Callable[[Expr, Any, Any], None]  # fills key and value float32 [d] of a token, None: neither


def leave(layout: Layout, target: Any) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments: those of a step (`layout.Step`); output: the step's rows, which other kernels take,
    so that they run behind this one.

    Parameters
    ----------
    layout : Layout
        Of the cache.
    target : Target, dict or TargetInfo
        What is compiled for.
    """
    with IRBuilder() as builder:
        with T.prim_func():
            v.function("cpu_packed_leave")
            handles = {name: T.arg(name, T.handle()) for name in (*Step.NAMES, "output")}
            step = Step(layout, handles)
            output = T.match_buffer(handles["output"], (2, step.n), "int32")
            with T.serial(0, 2) as i, T.serial(0, step.n) as t:
                T.buffer_store(output, step.rows[i, t], [i, t])
            heads = layout.layers * layout.kv_heads
            with T.parallel(0, step.count * heads) as item:
                b = e.let(v.div(item, heads), "b")
                rest = e.let(v.mod(item, heads), "rest")
                layer = e.let(v.div(rest, layout.kv_heads).astype("int64"), "layer")
                _leave(layout, Codes(layout, target), step, b, layer, v.mod(rest, layout.kv_heads))
        return builder.get()


def _leave(layout: Layout, codes: Codes, step: Step, b: Expr, layer: Expr, h: Expr) -> None:
    """Round what leaves of a sequence in a layer and head."""
    h, newest = e.let(h, "h"), layout.spec.newest
    before = e.let(step.sequences[b, BEFORE], "before")
    exact = e.let(step.sequences[b, EXACT], "exact")
    over = before + tirx.min(step.sequences[b, COUNT] - newest, 0)
    end = v.opaque(over, "end")
    with T.If(exact < end), T.Then():
        codes.begin()
        place = e.let(step.sequences[b, PLACE].astype("int64"), "place")

        def take(token: Expr, key: Any, value: Any) -> None:
            slot = v.opaque(v.mod(token, newest), "slot")
            recall(layout, step, [place, layer, h], slot, key, value)

        rounding = Rounding(layout, codes, step, take)
        rounding.run(b, layer, h, exact, end, (exact, before))


class Rounding:
    """Emits the rounding of a run of tokens.

    Parameters
    ----------
    take : callable
        Fetches a token.
    """

    def __init__(self, layout: Layout, codes: Codes, step: Step, take: Take) -> None:
        self.layout, self.step, self.take = layout, step, take
        self.pages = Pages(layout, codes, step.pages)

    def run(
        self, b: Expr, layer: Expr, h: Expr, begin: Expr, end: Expr, near: tuple[Expr, Expr] | None
    ) -> None:
        """Round tokens of a sequence into their pages.

        Parameters
        ----------
        begin, end : Expr
            The tokens.
        near : tuple of Expr, optional
            Tokens of which a page's mean is made; by default `newest` ones from the page's first.
        """
        layout, step = self.layout, self.step
        key, value = v.scratch("key", layout.head_dim), v.scratch("value", layout.head_dim)
        with T.serial(0, end - begin) as i:
            token = v.opaque(begin + i, "token")
            page = e.let(step.tables[b, v.div(token, PAGE)].astype("int64"), "page")
            slot = v.opaque(v.mod(token, PAGE), "slot")
            at = [page, layer, h]
            if layout.spec.centred:
                with T.If(slot == 0), T.Then():
                    few = min(layout.spec.newest, PAGE)
                    self._mean(at, key, *(near or (token, token + few)))
            self.take(token, key, value)
            self.pages.token(at, slot, key, value)

    def _mean(self, at: list, key: Any, first: Expr, end: Expr) -> None:
        sums = v.scratch("sums", self.layout.head_dim)
        columns = range(0, self.layout.head_dim, v.LANES)
        for j in columns:
            v.store(sums, v.const(0.0), [j])
        with T.serial(0, end - first) as i:
            self.take(v.opaque(first + i, "near"), key, None)
            for j in columns:
                v.store(sums, v.load(sums, [j]) + v.load(key, [j]), [j])
        self.pages.store_mean(at, sums, end - first)


def recall(layout: Layout, step: Step, at: list, slot: Expr, key: Any, value: Any) -> None:
    """Read a token in 16 bits: float32 [d] each, or None.

    Parameters
    ----------
    at : list of Expr
        Place in `recent`, layer, head.
    slot : Expr
        Its slot there.
    """
    d, recent = layout.head_dim, layout.spec.recent
    with T.serial(0, d) as i:
        T.buffer_store(key, step.recent[(*at, i * recent + slot)].astype("float32"), [i])
    if value is not None:
        for j in range(0, d, v.LANES):
            v.store(value, v.load(step.recent, [*at, d * recent + slot * d + j]), [j])


def halves(buffer: Any, row: list, target: Any, d: int) -> None:
    """Copy float32 [.., d] to [d], rounded to what 16 bits hold."""
    for j in range(0, d, v.LANES):
        half = e.cast(v.load(buffer, [*row, j]), "float16", v.LANES)
        v.store(target, e.cast(half, "float32", v.LANES), [j])
