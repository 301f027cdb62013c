"""The part of a decode step that attends to a sequence's tokens in 16 bits."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.attention import vector as v
from relax_passes.kernels.cpu.attention.decode import Decode
from relax_passes.kernels.cpu.attention.functions import soft_cap

from .layout import PLACE, Layout, Step


class RecentTokens(Decode):
    """Emits it; `b` is the sequence, `last` its new token, `low` the first that the query sees.

    Tokens from `exact` on are in 16 bits; `begin` is the first that is not one of the first ones.
    """

    layout: Layout
    step: Step
    layer: Any
    b: Any
    last: Any
    low: Any
    exact: Any
    begin: Any

    @property
    def slots(self) -> int:
        """Slots of tokens in 16 bits, whole vectors: what is read behind the last is masked."""
        return -(-self.layout.spec.recent // v.LANES) * v.LANES

    def _recent(self) -> None:
        """Attend to the tokens in 16 bits."""
        spec, step = self.layout.spec, self.step
        place = e.let(step.sequences[self.b, PLACE].astype("int64"), "place")
        vectors = self.slots // v.LANES
        self.used = e.const(vectors)
        with T.serial(0, self.config.num_kv_heads) as h:
            at = [place, self.layer, h]
            head0 = v.opaque(h * self.group, "head0")
            with T.serial(0, vectors) as i:
                for tile in self._tiles(self.heads_tile, self.group):
                    sums = {g: [v.Register(v.const(0.0), "acc") for _ in range(2)] for g in tile}
                    with T.serial(0, self.d // 2) as pair:
                        for p in range(2):
                            channel = pair * 2 + p
                            place_ = channel * spec.recent + i * v.LANES
                            key = e.let(v.load(step.recent, [*at, place_]), "key")
                            for g in tile:
                                query = v.splat(self.qs[head0 + g, channel])
                                sums[g][p].set(query * key + sums[g][p].get())
                    seen = self._held(T.Ramp(i * v.LANES, 1, v.LANES))
                    for g in tile:
                        score = sums[g][0].get() + sums[g][1].get()
                        score = soft_cap(score, self.config.soft_cap)
                        self._score(head0 + g, i * v.LANES, score, seen)
            with T.serial(0, self.group) as g:
                self._softmax(head0 + g)
            begin = self.d * spec.recent
            for tile in self._tiles(self.heads_tile, self.group):
                for columns in self._tiles(self.column_tile, self.columns):
                    outs = {
                        (g, c): v.Register(v.load(self.o, [head0 + g, c * v.LANES]), "acc")
                        for g in tile
                        for c in columns
                    }
                    with T.serial(0, spec.recent) as t:
                        rows = {}
                        for c in columns:
                            place_ = begin + t * self.d + c * v.LANES
                            rows[c] = e.let(v.load(step.recent, [*at, place_]), "row")
                        for g in tile:
                            weight = e.let(v.splat(self.s[head0 + g, t]), "weight")
                            for c in columns:
                                outs[g, c].set(weight * rows[c] + outs[g, c].get())
                    for (g, c), register in outs.items():
                        v.store(self.o, register.get(), [head0 + g, c * v.LANES])

    def _held(self, slots: Expr) -> Expr:
        """Whether slots hold tokens that the query sees."""
        spec = self.layout.spec

        def c(value: int | Expr) -> Expr:
            return v.splat(value) if not isinstance(value, int) else v.const(value, dtype="int32")

        # The newest token of a slot; below 0 where it has none.
        back = tirx.truncmod(c(self.last) + c(spec.newest) - slots, c(spec.newest))
        position = e.opaque(c(self.last) - back, "int32", v.LANES)
        least = tirx.max(tirx.max(self.exact, self.begin), spec.first)
        newest = tirx.And(slots < c(spec.newest), position >= v.splat(least))
        own = slots - c(spec.newest)
        inside = tirx.And(own >= c(0), own < c(spec.first))
        sees = tirx.And(own <= c(self.last), own >= c(self.low))
        held = tirx.Or(newest, tirx.And(inside, sees))
        flags = tirx.Select(held, v.const(1, dtype="int32"), v.const(0, dtype="int32"))
        return e.opaque(flags, "int32", v.LANES) > v.const(0, dtype="int32")

    def _score(self, head: Expr, at: Expr, score: Expr, seen: Expr) -> None:
        score = e.let(tirx.Select(seen, score, v.const(v.NEG_INF)), "score")
        v.store(self.s, score, [head, at])
        v.store(self.top, tirx.max(v.load(self.top, [head, 0]), score), [head, 0])
