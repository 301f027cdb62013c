"""The first kernel of a layer: rotate and turn what a step brings."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.attention import vector as v
from relax_passes.kernels.cpu.attention.config import KVCacheConfig
from relax_passes.kernels.cpu.attention.rotary import Split

from .layout import PLACE, Layout, Step
from .turn import turn_size, turned


def store(layout: Layout, config: KVCacheConfig) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments: qkv float32 [n, heads + 2 kv_heads, d], those of a step (`layout.Step`), layer
    (int64); outputs q [n, heads, d], k and v [n, kv_heads, d], float32: rotated and turned. A step
    in which each sequence has one row also stores it among the tokens in 16 bits; others do that
    behind their attention, which reads those that were there.

    Parameters
    ----------
    layout : Layout
        Of the cache.
    config : KVCacheConfig
        Of one layer.
    """
    return _Store(layout, config).build()


class _Store:
    """Emits the kernel."""

    def __init__(self, layout: Layout, config: KVCacheConfig) -> None:
        self.layout, self.config, self.d = layout, config, config.head_dim
        self.columns = range(0, self.d, v.LANES)

    def build(self) -> tirx.PrimFunc:
        heads, kv_heads, d = self.config.num_heads, self.config.num_kv_heads, self.d
        with IRBuilder() as builder:
            with T.prim_func():
                v.function("cpu_packed_store")
                names = ("qkv", *Step.NAMES)
                handles = {name: T.arg(name, T.handle()) for name in names}
                layer = T.arg("layer", T.int64())
                handles |= {name: T.arg(name, T.handle()) for name in "qkv"}
                n = T.int32()
                qkv = T.match_buffer(handles["qkv"], (n, heads + 2 * kv_heads, d), "float32")
                self.step, self.layer = Step(self.layout, handles), layer
                q = T.match_buffer(handles["q"], (n, heads, d), "float32")
                k = T.match_buffer(handles["k"], (n, kv_heads, d), "float32")
                value = T.match_buffer(handles["v"], (n, kv_heads, d), "float32")
                outputs = (("q", q, heads), ("k", k, kv_heads), ("v", value, kv_heads))
                positions = _Positions(self.step.rows)
                split = Split(self.config, qkv, positions, tirx.const(1, "int64"))

                def token(t: Expr) -> None:
                    split.token(t, outputs)
                    self._token(t, q, k, value)

                v.over_tokens(n, token)
            return builder.get()

    def _token(self, t: Expr, q: Any, k: Any, value: Any) -> None:
        step, layout = self.step, self.layout
        with T.serial(0, self.config.num_heads) as h:
            self._turn(q, t, h)
        position = e.let(step.rows[0, t], "position")
        sequence = e.let(step.rows[1, t], "sequence")
        with T.serial(0, self.config.num_kv_heads) as h:
            self._turn(k, t, h)
            self._turn(value, t, h)
            with T.If(step.n == step.count), T.Then():
                place = e.let(step.sequences[sequence, PLACE].astype("int64"), "place")
                remember(layout, step, [place, self.layer, h], position, (k, value), [t, h])

    def _turn(self, buffer: Any, t: Expr, h: Expr) -> None:
        """Turn a head of a row in place."""
        if not self.layout.spec.turned:
            return
        row = [v.hold(v.load(buffer, [t, h, j]), "row") for j in self.columns]
        for j, part in zip(self.columns, turned(row, turn_size(self.d)), strict=True):
            v.store(buffer, part, [t, h, j])


class _Positions:
    """The positions of a step's rows, as a vector."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __getitem__(self, t: Expr) -> Expr:
        return self._rows[0, t]


def remember(
    layout: Layout, step: Step, at: list, position: Expr, buffers: tuple, row: list
) -> None:
    """Store keys and values of a token among those in 16 bits.

    Parameters
    ----------
    at : list of Expr
        Place in `recent`, layer, head.
    position : Expr
        The token.
    buffers, row : tuple, list
        Keys and values float32 [.., d], and where the token's are.
    """
    newest, first = layout.spec.newest, layout.spec.first

    def write(slot: Expr) -> None:
        with T.serial(0, layout.head_dim) as i:
            key = buffers[0][(*row, i)]
            T.buffer_store(step.recent, key.astype("float16"), [*at, i * layout.spec.recent + slot])
        begin = layout.head_dim * layout.spec.recent
        with T.serial(0, layout.head_dim // v.LANES) as i:
            value = v.load(buffers[1], [*row, i * v.LANES])
            place = begin + slot * layout.head_dim + i * v.LANES
            v.store(step.recent, value, [*at, place])

    write(v.opaque(v.mod(position, newest), "slot"))
    with T.If(position < first), T.Then():
        write(v.opaque(newest + position, "slot"))
