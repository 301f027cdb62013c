"""Elementary functions of 16-lane vectors: 2^x, log2, sine and cosine, and bounds on scores.

Polynomials after a range reduction, so that they need no library and vectorize on every target.
Intermediate values go through :func:`~.vector.hold`, which keeps TVM's simplifier from expanding
them into each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr

from .vector import cast, const, hold


def polynomial(x: Expr, coefficients: Sequence[float], dtype: str = "float32") -> Expr:
    """Evaluate c0 + c1 x + c2 x^2 + ... by Horner's rule."""
    result = const(coefficients[-1], dtype=dtype)
    for c in reversed(coefficients[:-1]):
        result = result * x + const(c, dtype=dtype)
    return result


# 2^f on [-0.5, 0.5], Chebyshev interpolation: relative error 1.0e-7.
_EXP2 = (
    1.0000000754548972,
    0.6931471880262273,
    0.2402210748530968,
    0.05550357114222094,
    0.009676031918255982,
    0.001339086336353527,
)
_ROUND32 = 12582912.0  # 1.5 * 2^23: adding it rounds a float32 to an integer in its low bits


def exp2(x: Expr) -> Expr:
    """2^x for x <= 127: relative error below 3e-7, exactly 0 below -126.5.

    x = n + f with |f| <= 0.5; 2^n is made in the exponent field, where n = -127 gives zero.
    """
    x = hold(tirx.max(x, const(-127.0)), "x")
    bits = hold(tirx.reinterpret("int32x16", x + const(_ROUND32)), "bits")
    n = bits - const(0x4B400000 - 127, dtype="int32")
    scale = tirx.reinterpret("float32x16", n << const(23, dtype="int32"))
    # Through the bits, because TVM's simplifier would turn (x + c) - c into x.
    f = hold(x - (tirx.reinterpret("float32x16", bits) - const(_ROUND32)), "f")
    return polynomial(f, _EXP2) * scale


# (tanh(x) - x) / x^3 in x^2 for |x| < 0.625, from Cephes (Moshier), tanhf: 1e-7.
_TANH = (
    -3.33332819422e-1,
    1.33314422036e-1,
    -5.37397155531e-2,
    2.06390887954e-2,
    -5.70498872745e-3,
)


def soft_cap(score: Expr, cap: float) -> Expr:
    """Bound scores s to c tanh(s / c); s is in log2 units, c in natural ones, 0 for no bound.

    tanh(x) = 1 - 2 / (1 + e^2x) cancels near 0, where a polynomial takes over.
    """
    if not cap:
        return score
    x = hold(score * const(math.log(2) / cap), "x")
    e2x = exp2(tirx.min(x * const(2 * math.log2(math.e)), const(40.0)))  # tanh(14) is 1
    far = const(1.0) - const(2.0) / (const(1.0) + e2x)
    square = hold(x * x, "square")
    near = polynomial(square, _TANH) * square * x + x
    bounded = tirx.Select(square < const(0.625**2), near, far)
    return hold(bounded * const(cap * math.log2(math.e)), "capped")


def log2(x: Expr) -> Expr:
    """log2(x) of positive normal numbers: absolute error below 2e-7 * max(1, |log2 x|).

    x = 2^e m with m in [sqrt(1/2), sqrt(2)); log2 m = 2 / ln 2 * atanh((m - 1) / (m + 1)).
    """
    bits = hold(tirx.reinterpret("int32x16", x), "bits")
    offset = const(0x3F3504F3, dtype="int32")  # bits of sqrt(1/2)
    e = hold((bits - offset) >> const(23, dtype="int32"), "e")
    m = hold(tirx.reinterpret("float32x16", bits - (e << const(23, dtype="int32"))), "m")
    s = hold((m - const(1.0)) / (m + const(1.0)), "s")
    series = polynomial(hold(s * s, "s2"), [1.0, 1 / 3, 1 / 5, 1 / 7, 1 / 9])
    return s * const(2 / math.log(2)) * series + cast(e, "float32")


# Taylor coefficients of sin(r)/r and cos(r) in r^2: below 2e-11 on [-pi/4, pi/4].
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(6)]
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(7)]
_ROUND64 = 6755399441055744.0  # 1.5 * 2^52
_HALF_PI_HIGH = 1.57079632673412561417  # 33 bits of pi / 2, so that k * high is exact
_HALF_PI_LOW = 6.07710050650619224932e-11


def sincos(angle: Expr) -> tuple[Expr, Expr]:
    """Sine and cosine of float32 angles up to 1e6, correct to float32 rounding.

    The reduction to a quadrant is done in float64: a float32 angle of 1e5 is itself exact, and
    float64 leaves 1e-11 of it after the subtraction.
    """
    x = hold(cast(angle, "float64"), "angle")
    shifted = x * const(2 / math.pi, dtype="float64") + const(_ROUND64, dtype="float64")
    bits = hold(tirx.reinterpret("int64x16", shifted), "bits")  # see exp2
    quadrant = hold(cast(bits, "int32"), "quadrant")
    k = hold(tirx.reinterpret("float64x16", bits) - const(_ROUND64, dtype="float64"), "k")
    high = x - k * const(_HALF_PI_HIGH, dtype="float64")
    r = hold(high - k * const(_HALF_PI_LOW, dtype="float64"), "r")
    r2 = hold(r * r, "r2")
    sin_r = hold(cast(polynomial(r2, _SIN, "float64") * r, "float32"), "sin_r")
    cos_r = hold(cast(polynomial(r2, _COS, "float64"), "float32"), "cos_r")
    zero, one, two = (const(v, dtype="int32") for v in (0, 1, 2))
    odd = (quadrant & one) != zero
    sin_abs = tirx.Select(odd, cos_r, sin_r)
    cos_abs = tirx.Select(odd, sin_r, cos_r)
    sine = tirx.Select((quadrant & two) != zero, -sin_abs, sin_abs)
    cosine = tirx.Select(((quadrant + one) & two) != zero, -cos_abs, cos_abs)
    return hold(sine, "sine"), hold(cosine, "cosine")
