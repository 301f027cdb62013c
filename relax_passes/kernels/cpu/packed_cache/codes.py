"""Stored codes to float32 in vector registers: the twin of the formats' ``decode``.

Codes come as int32 lanes that hold several of them. Values of E2M1 are looked up by their four bits
where an instruction does that (vpermps reads the low four bits of a lane, AVX2's the low three, the
magnitude) and made by arithmetic elsewhere. A format with a scale for each sign takes it by the
sign of the value.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from amx_tvm.formats import e2m1
from amx_tvm.formats.int8 import BYTE_OFFSET
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.attention import vector as v

from .layout import Layout

_PERMUTE = "llvm.x86.avx512.permvar.sf.512"
_PERMUTE_8 = "llvm.x86.avx2.permps"


class Codes:
    """Decodes for one layout on a target.

    Parameters
    ----------
    layout : Layout
        With the format.
    target : Target, dict or TargetInfo
        Whose instructions there are.
    """

    def __init__(self, layout: Layout, target) -> None:  # noqa: ANN001
        self.layout, self.format = layout, layout.format
        self.eight = layout.format.code_bits == 8
        self.signs = len(layout.format.scale_tensors) == 2
        self.permutes = TargetInfo.of(target).has("avx512f")
        self.halves = TargetInfo.of(target).has("avx2") and not self.permutes
        # Bits of a lane at which the columns of a tile begin, in the columns' order.
        self.shifts = (*range(0, 32, 8), *(() if self.eight else range(4, 32, 8)))

    def begin(self) -> None:
        """Make the table of the function that is being built."""
        if self.permutes and not self.eight:
            items = [tirx.const(value, "float32") for value in e2m1.VALUES]
            self.table = e.let(T.Shuffle(items, list(range(16))), "table")
        if self.halves and not self.eight:
            items = [tirx.const(value, "float32") for value in e2m1.MAGNITUDES]
            self.table = e.let(T.Shuffle(items, list(range(8))), "table")

    @property
    def columns(self) -> int:
        """Columns of a tile that a vector of 16 lanes holds."""
        return len(self.shifts)

    def number(self, lanes: Expr, shift: int) -> Expr:
        """Values, without scale, of the codes at a bit of int32 lanes."""
        moved = e.let(lanes >> v.const(shift, dtype="int32"), "code") if shift else lanes
        if self.eight:
            byte = (moved & v.const(255, dtype="int32")) - v.const(BYTE_OFFSET, dtype="int32")
            return v.cast(byte, "float32")
        if self.permutes:
            return e.let(e.llvm("float32x16", _PERMUTE, self.table, moved), "number")
        return _signed(self._magnitude(moved), moved)

    def _magnitude(self, lanes: Expr) -> Expr:
        if not self.halves:
            return _e2m1(lanes)
        lanes = e.let(lanes, "code")
        parts = [T.Shuffle([lanes], list(range(i, i + 8))) for i in (0, 8)]
        parts = [e.let(e.llvm("float32x8", _PERMUTE_8, self.table, p), "half") for p in parts]
        return T.Shuffle(parts, list(range(16)))

    def scaled(self, number: Expr, scales: list[Expr]) -> Expr:
        """Multiply by the scale, or by that of the value's sign."""
        if not self.signs:
            return number * scales[0]
        number = v.hold(number, "number")
        return number * tirx.Select(number < v.const(0.0), scales[1], scales[0])

    def pair(self, buffer, at: list, scales: Callable[[int], list[Expr]]) -> list[Expr]:  # noqa: ANN001
        """Decode the 32 channels of a token's value, two vectors.

        Parameters
        ----------
        buffer, at : Buffer, list of Expr
            Where the codes begin.
        scales : callable
            Scales of a half of the channels, in all lanes.
        """
        if self.eight:
            raw = [e.load(buffer, *at[:-1], at[-1] + i, lanes=16) for i in (0, 16)]
            return [
                v.hold(self.scaled(self._byte(r), scales(i)), "value") for i, r in enumerate(raw)
            ]
        words = e.let(v.cast(e.load(buffer, *at, lanes=16), "int32"), "words")
        if not self.permutes or self.layout.subgroups == 2:
            halves = [self.number(words, shift) for shift in (0, 4)]
            return [
                v.hold(self.scaled(h, scales(i if self.layout.subgroups == 2 else 0)), "value")
                for i, h in enumerate(halves)
            ]
        # One product makes a table of the token's own values of all codes.
        own = scales(0)
        positive = T.Ramp(e.const(0), 1, v.LANES) < v.const(e2m1.SIGN_BIT, dtype="int32")
        table = own[0] if len(own) == 1 else tirx.Select(positive, own[0], own[1])
        table = v.hold(self.table * table, "table")
        high = e.let(words >> v.const(4, dtype="int32"), "code")
        return [e.let(e.llvm("float32x16", _PERMUTE, table, x), "value") for x in (words, high)]

    def _byte(self, raw: Expr) -> Expr:
        return v.cast(v.cast(raw, "int32") - v.const(BYTE_OFFSET, dtype="int32"), "float32")

    def scale(self, load: Callable[[int], Expr], half: int, name: str = "scale") -> list[Expr]:
        """Decode the scales of 16 tokens of a half of 32 channels; ``load(part)`` gives bytes."""
        sub = half if self.layout.subgroups == 2 else 0
        found = []
        for i, tensor in enumerate(self.format.scale_tensors):
            stored = load(i * self.layout.subgroups + sub)
            found.append(v.hold(self.format.decode_scale_tir(tensor.name, stored), name))
        return found


def scales_at(buffer, at: list, bytes_: int) -> Expr:  # noqa: ANN001
    """Load 16 stored scales of one or two bytes."""
    raw = e.load(buffer, *at, lanes=16 * bytes_)
    return raw if bytes_ == 1 else e.bits(raw, "uint16", 16)


def scale_at(buffer, at: list, bytes_: int) -> Expr:  # noqa: ANN001
    """Load one stored scale."""
    if bytes_ == 1:
        return e.load(buffer, *at)
    return e.bits(e.load(buffer, *at, lanes=2), "uint16")


def _e2m1(lanes: Expr) -> Expr:
    """E2M1 magnitudes of the low three bits, by exponent and mantissa at float32's place."""
    code = e.let(lanes & v.const(7, dtype="int32"), "magnitude")
    normal = (code << v.const(22, dtype="int32")) + v.const(126 << 23, dtype="int32")
    small = v.cast(code, "float32") * v.const(0.5)
    return tirx.Select(
        code < v.const(2, dtype="int32"), small, tirx.reinterpret("float32x16", normal)
    )


def _signed(magnitude: Expr, lanes: Expr) -> Expr:
    """Give magnitudes the sign of bit 3."""
    sign = (lanes & v.const(e2m1.SIGN_BIT, dtype="int32")) << v.const(28, dtype="int32")
    bits = e.bits(v.hold(magnitude, "number"), "int32", 16) | sign
    return v.hold(tirx.reinterpret("float32x16", bits), "number")
