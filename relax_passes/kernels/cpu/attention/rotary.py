"""Split a fused qkv into q, k and v, and rotate q and k; round them where attention is quantized.

Cosine and sine are computed once a token, for all heads: positions times constant frequencies,
rounded to float32 as a torch model rounds them, then reduced in float64.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from relax_passes.kernels.cpu import emit as e

from . import vector as v
from .config import KVCacheConfig
from .functions import sincos
from .rounding import Rounding


def split_rotary(config: KVCacheConfig, always: bool = False) -> tirx.PrimFunc:
    """Build the kernel; with ``always`` its last argument is left out, and it rotates.

    Arguments of the kernel: qkv [n, heads + 2 kv_heads, d], position_map int32 [n], then the
    outputs q [n, heads, d], k [n, kv_heads, d] and v [n, kv_heads, d], and apply_rope (int64; 0
    copies without rotating).
    """
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
    with IRBuilder() as builder:
        with T.prim_func():
            v.function("cpu_split_rotary")
            handles = [T.arg(n, T.handle()) for n in ("qkv", "position_map", "q", "k", "v")]
            apply_rope = tirx.const(1, "int64") if always else T.arg("apply_rope", T.int64())
            n, offset = T.int32(), T.int32()
            qkv = T.match_buffer(handles[0], (n, heads + 2 * kv_heads, d), config.dtype)
            positions = T.match_buffer(handles[1], (n,), "int32", elem_offset=offset)
            q = T.match_buffer(handles[2], (n, heads, d), config.dtype)
            k = T.match_buffer(handles[3], (n, kv_heads, d), config.dtype)
            value = T.match_buffer(handles[4], (n, kv_heads, d), config.dtype)
            outputs = (("q", q, heads), ("k", k, kv_heads), ("v", value, kv_heads))
            split = Split(config, qkv, positions, apply_rope)
            v.over_tokens(n, lambda t: split.token(t, outputs))
        return builder.get()


class Split:
    """Emits what is done with one token."""

    def __init__(self, config: KVCacheConfig, qkv, positions, apply_rope: Expr) -> None:  # noqa: ANN001
        self.qkv, self.positions, self.apply_rope = qkv, positions, apply_rope
        self.d, self.rotation = config.head_dim, config.rotation
        self.half = config.rotation.pairs
        self.width = math.gcd(self.half, v.LANES)
        self.rounding = Rounding(config.quantize) if config.quantize else None

    def token(self, t: Expr, outputs: tuple) -> None:
        """Split one row of qkv."""
        d, half = self.d, self.half
        turns = self._turns(t) if half else None
        first = 0
        for name, buffer, count in outputs:
            with T.serial(0, count) as h:
                rotated = name != "v"
                start = 2 * half if rotated else 0
                if turns is not None:
                    self._turn(t, h, half // self.width if rotated else 0, buffer, first, *turns)
                step = math.gcd(d - start, v.LANES)
                with T.serial(0, (d - start) // step if start < d else 0) as i:
                    j = start + i * step
                    v.store(buffer, v.load(self.qkv, [t, h + first, j], step), [t, h, j], step)
                if self.rounding is not None and rotated:
                    columns = range(0, d, v.LANES)
                    row = [v.hold(v.load(buffer, [t, h, j]), "row") for j in columns]
                    row = self.rounding.along_lanes(row, self.rounding.row_scale(row))
                    for j, value in zip(columns, row, strict=True):
                        v.store(buffer, value, [t, h, j])
            first += count

    def _turns(self, t: Expr):  # noqa: ANN202
        """Cosine and sine of a token, [half] each."""
        half, width = self.half, self.width
        inv_freq, factor = self.rotation.frequencies, self.rotation.factor
        cos, sin = v.scratch("cos", half), v.scratch("sin", half)
        padded = -(-half // v.LANES) * v.LANES
        with T.If(self.apply_rope > 0):
            with T.Then():
                position = e.let(self.positions[t].astype("float32"), "position")
                for j in range(0, padded, v.LANES):
                    lanes = [float(inv_freq[min(j + i, half - 1)]) for i in range(v.LANES)]
                    freq = T.Shuffle(
                        [tirx.const(f, "float32") for f in lanes], list(range(v.LANES))
                    )
                    s, c = sincos(e.let(v.splat(position) * freq, "angle"))
                    n = min(v.LANES, half - j)
                    for value, buffer in ((c, cos), (s, sin)):
                        scaled = e.let(value * v.const(factor) if factor != 1.0 else value)
                        if n == v.LANES:
                            v.store(buffer, scaled, [j])
                        else:
                            for i in range(n):
                                T.buffer_store(buffer, T.Shuffle([scaled], [i]), [j + i])
            with T.Else():
                for j in range(0, half, width):
                    v.store(cos, v.const(1.0, width), [j], width)
                    v.store(sin, v.const(0.0, width), [j], width)
        return cos, sin

    def _turn(self, t: Expr, h: Expr, count: int, buffer, first: int, cos, sin) -> None:  # noqa: ANN001
        """Rotate head `first + h` of the input into head h of a result."""
        half, width = self.half, self.width
        with T.serial(0, count) as i:
            j = i * width
            low = e.let(v.load(self.qkv, [t, h + first, j], width), "low")
            high = e.let(v.load(self.qkv, [t, h + first, half + j], width), "high")
            c = e.let(v.load(cos, [j], width), "c")
            s = e.let(v.load(sin, [j], width), "s")
            v.store(buffer, low * c - high * s, [t, h, j], width)
            v.store(buffer, high * c + low * s, [t, h, half + j], width)
