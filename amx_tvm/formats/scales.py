"""The stored types of group scales: rounding to them, decoding them in NumPy and in TensorIR.

Every scale is >= 0, so the sign bit of the 8-bit floats is never set. All of them decode exactly to
float32. Byte 0 means "this half of the group is zero" for E5M2 and E4M3; E8M0 has no zero, its byte
0 is 2^-127 (OCP MX v1.0), and the codes under it are 0 when the group is.

    type      layout   step at 0   largest      never written, refused by a reader
    E5M2      s5e2m    2^-16       57344 0x7B   0x7C..0xFF  Inf, NaN, negative
    E4M3      s4e3m    2^-9          448 0x7E   0x7F..0xFF  NaN, negative
    E8M0      8e       (no zero)   2^127 0xFE   0xFF        NaN
    float16   s5e10m   2^-24       65504        Inf, NaN, negative

Rounding to the two 8-bit floats is to nearest, ties away from zero, subnormals kept, saturating;
to float16 it is NumPy's (ties to even), saturating.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np

from amx_tvm.errors import FormatError

# Largest float32 below one half. trunc(x + HALF) rounds x >= 0 to nearest with ties away from zero
# for x < 2^22: with 0.5 itself the sum 0.49999997 + 0.5 would round up to 1.
HALF = np.nextafter(np.float32(0.5), np.float32(0.0))


def lanes_suffix(expr: Any) -> str:
    """Return "" for a scalar TIR expression and "x16" for one of 16 lanes."""
    dtype = str(expr.ty)  # TVM 0.27: expressions carry a PrimType and no longer a dtype string
    return dtype[dtype.index("x") :] if "x" in dtype else ""


def round_away(values: np.ndarray) -> np.ndarray:
    """Round float32 values, |x| < 2^22, to integers (as float32), ties away from zero."""
    return np.trunc(values + np.copysign(HALF, values))


class ScaleType(ABC):
    """One stored scale type: name, storage, the largest stored number and both decoders."""

    name: str
    dtype: str = "uint8"
    largest: int  # largest legal stored number (its bit pattern for float16)

    @property
    def bytes(self) -> int:
        """Size of one stored scale in bytes."""
        return np.dtype(self.dtype).itemsize

    @abstractmethod
    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Exact float32 values of stored scales."""

    @abstractmethod
    def decode_tir(self, expr: Any) -> Any:
        """TIR twin of `decode`: `uint8` or `uint8xL` in, `float32` or `float32xL` out."""

    def times(self, stored: np.ndarray, powers: np.ndarray) -> np.ndarray:
        """Stored scales times 2^powers (int32), rounded to where the type's numbers end."""
        raise FormatError(f"a {self.name} is no scale that can be multiplied")

    def check(self, stored: np.ndarray, label: str) -> None:
        """Raise FormatError when a stored scale is one that is never written."""
        bits = stored.view(np.uint16) if stored.dtype == np.float16 else stored
        if bits.size and int(bits.max()) > self.largest:
            index = tuple(int(i) for i in np.argwhere(bits > self.largest)[0])
            raise FormatError(
                f"{label} holds the {self.name} scale 0x{int(bits[index]):02x} at group {index}, "
                f"but stored scales end at 0x{self.largest:02x}; the data is damaged or was made "
                "by another program, so quantize the weights again"
            )


class Minifloat(ScaleType):
    """An 8-bit float scale with IEEE-like subnormals and bias 2^(exponent_bits-1) - 1."""

    def __init__(self, name: str, exponent_bits: int, mantissa_bits: int, largest: int):
        self.name = name
        self.mantissa_bits = mantissa_bits
        self.bias = (1 << (exponent_bits - 1)) - 1
        self.largest = largest

    @cached_property
    def values(self) -> np.ndarray:
        """float32 [256]: the value of every byte, read as an unsigned float without Inf or NaN."""
        exponent, mantissa = np.divmod(np.arange(256), 1 << self.mantissa_bits)
        implied = np.where(exponent > 0, 1 << self.mantissa_bits, 0)
        power = np.maximum(exponent, 1) - self.bias - self.mantissa_bits
        return np.ldexp((implied + mantissa).astype(np.float32), power).astype(np.float32)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Round float32 values >= 0 to bytes: nearest, ties away from zero, saturating."""
        values = np.ascontiguousarray(values, np.float32)
        drop = 23 - self.mantissa_bits
        # Adding half a step to the bit pattern rounds the magnitude half up, carries into the
        # exponent included; then the exponent is rebiased. Inf stays above every finite pattern.
        bits = values.view(np.int32) + np.int32(1 << (drop - 1))
        normal = (bits >> drop) - np.int32((127 - self.bias) << self.mantissa_bits)
        least_normal = np.ldexp(np.float32(1), 1 - self.bias)
        steps = np.minimum(values, least_normal) * np.ldexp(
            np.float32(1), self.bias - 1 + self.mantissa_bits
        )
        subnormal = round_away(steps).astype(np.int32)
        rounded = np.where(values < least_normal, subnormal, normal)
        return np.minimum(rounded, self.largest).astype(np.uint8)

    def times(self, stored: np.ndarray, powers: np.ndarray) -> np.ndarray:
        """As the base says."""
        return self.encode(np.ldexp(self.decode(stored), powers))

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Exact float32 values of stored scales."""
        return self.values[stored]

    def decode_tir(self, expr: Any) -> Any:
        """TIR twin of `decode`, any lanes."""
        from tvm import tirx

        suffix = lanes_suffix(expr)
        if (
            self.name == "E5M2"
        ):  # the upper byte of a float16: one shift and the hardware conversion
            half = tirx.Cast("uint16" + suffix, expr) << tirx.const(8, "uint16")
            return tirx.Cast("float32" + suffix, tirx.reinterpret("float16" + suffix, half))
        # Exponent and mantissa at float32's place with the wrong bias; the product with a power of
        # two mends the bias, for subnormals too (they are float32 subnormals before it).
        bits = tirx.Cast("int32" + suffix, expr) << tirx.const(23 - self.mantissa_bits, "int32")
        return tirx.reinterpret("float32" + suffix, bits) * tirx.const(
            2.0 ** (127 - self.bias), "float32"
        )


class E8M0(ScaleType):
    """A power of two 2^(byte - 127): OCP MX's scale."""

    name = "E8M0"
    largest = 0xFE
    # 6 * 2^125 is the largest element times scale that float32 holds, so exponents end there.
    _highest_written = 125 + 127

    def encode(self, maximum: np.ndarray, round_up: bool = False) -> np.ndarray:
        """Bytes of 2^(floor(log2 max) - 2) for group maxima (float32, >= 0), clamped to 2^-127.

        With `round_up` the exponent grows by 1 where max / 2^floor(log2 max) >= 1.75: the maximum
        would otherwise saturate (AMXFP4's PoT-R, scale_mode 3 of the reference code).
        """
        bits = np.ascontiguousarray(maximum, np.float32).view(np.int32)
        exponent = (bits >> 23) - 2
        if round_up:
            exponent = exponent + ((bits & 0x7FFFFF) >= 0x600000)
        return np.clip(exponent, 0, self._highest_written).astype(np.uint8)

    def times(self, stored: np.ndarray, powers: np.ndarray) -> np.ndarray:
        """As the base says."""
        return np.clip(stored + powers, 0, self._highest_written).astype(np.uint8)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Exact float32 values of stored scales."""
        bits = np.maximum(stored.astype(np.int32) << 23, np.int32(1 << 22))
        return bits.view(np.float32)

    def decode_tir(self, expr: Any) -> Any:
        """TIR twin of `decode`, any lanes."""
        from tvm import tirx

        suffix = lanes_suffix(expr)
        bits = tirx.Cast("int32" + suffix, expr) << tirx.const(23, "int32")
        # Pattern 1 << 22 is the float32 subnormal 2^-127, the value of byte 0.
        return tirx.reinterpret("float32" + suffix, tirx.max(bits, tirx.const(1 << 22, "int32")))


class Float16(ScaleType):
    """An IEEE half, as GGUF's block formats store it."""

    name = "float16"
    dtype = "float16"
    largest = 0x7BFF

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Round float32 values >= 0 to float16, ties to even, saturating at 65504."""
        return np.minimum(values, np.float32(65504)).astype(np.float16)

    def times(self, stored: np.ndarray, powers: np.ndarray) -> np.ndarray:
        """As the base says."""
        return self.encode(np.ldexp(self.decode(stored), powers))

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Exact float32 values of stored scales."""
        return stored.astype(np.float32)

    def decode_tir(self, expr: Any) -> Any:
        """As the base says; the stored expression is float16 or its bits as uint16, any lanes."""
        from tvm import tirx

        suffix = lanes_suffix(expr)
        if str(expr.ty).startswith("uint16"):
            expr = tirx.reinterpret("float16" + suffix, expr)
        return tirx.Cast("float32" + suffix, expr)


class ZeroPoint(ScaleType):
    """A 4-bit integer zero point, one byte each: the code whose value is 0."""

    name = "zero point"
    largest = 15

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Exact float32 values of stored scales."""
        return stored.astype(np.float32)

    def decode_tir(self, expr: Any) -> Any:
        """TIR twin of `decode`, any lanes."""
        from tvm import tirx

        return tirx.Cast("float32" + lanes_suffix(expr), expr)


E5M2 = Minifloat("E5M2", exponent_bits=5, mantissa_bits=2, largest=0x7B)
E4M3 = Minifloat("E4M3", exponent_bits=4, mantissa_bits=3, largest=0x7E)
# The AMXFP4 reference code lets E4M3 reach 480 (byte 0x7F, a NaN for every other reader). Only to
# reproduce its numbers, never in a file.
E4M3_480 = Minifloat("E4M3-480", exponent_bits=4, mantissa_bits=3, largest=0x7F)
POWER_OF_TWO = E8M0()
FLOAT16 = Float16()
ZERO_POINT = ZeroPoint()
