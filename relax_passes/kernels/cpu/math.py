"""Vector math that LLVM would otherwise compute lane by lane.

``T.exp`` becomes 16 calls of a scalar function.  exp(x) here is 2^n * p(f) with n = rint(x log2 e),
f = x - n ln 2 (split in two constants) and a degree-six polynomial: relative error below 2e-7.
"""

from __future__ import annotations

import math

from tvm import tirx

from . import emit as e
from .emit import Expr

LOG2E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # Cody and Waite; the high part has 9 bits
EXP_POLYNOMIAL = (  # Cephes expf, for |f| <= ln(2) / 2; exp(f) = 1 + f + f^2 * p(f)
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
EXP_LOW, EXP_HIGH = -87.0, 88.0


def exp(x: Expr, lanes: int) -> Expr:
    """Compute e^x on float32 vectors; x is clamped to [-87, 88]."""

    def c(value: float) -> Expr:
        return e.const(value, "float32", lanes)

    x = e.let(tirx.max(tirx.min(x, c(EXP_HIGH)), c(EXP_LOW)))
    dtype = f"float32x{lanes}" if lanes > 1 else "float32"
    n = e.let(e.llvm(dtype, "llvm.rint", x * c(LOG2E)))
    f = e.let(e.fma(n, c(-LN2_LOW), e.fma(n, c(-LN2_HIGH), x, lanes), lanes))
    p = c(EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        p = e.let(e.fma(p, f, c(coefficient), lanes))
    p = e.let(e.fma(p, f * f, f + c(1.0), lanes))
    exponent = (e.cast(n, "int32", lanes) + e.const(127, "int32", lanes)) << e.const(
        23, "int32", lanes
    )
    return e.let(p * e.bits(exponent, "float32", lanes))


def silu(x: Expr, lanes: int) -> Expr:
    """Compute x / (1 + e^-x) on float32 vectors."""
    one = e.const(1.0, "float32", lanes)
    x = e.let(x)
    return e.let(x / (one + exp(e.const(0.0, "float32", lanes) - x, lanes)))


def gelu_tanh(x: Expr, lanes: int) -> Expr:
    """Compute x (1 + tanh(u)) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3), on float32 vectors.

    That is x / (1 + e^-2u).
    """
    x, one = e.let(x), e.const(1.0, "float32", lanes)
    factor = e.const(-2 * (2 / math.pi) ** 0.5, "float32", lanes)
    inner = e.fma(x * x, e.const(0.044715, "float32", lanes), one, lanes)
    return e.let(x / (one + exp(factor * x * inner, lanes)))


# erf(z) = 1 - t p(t) e^(-z^2), t = 1 / (1 + 0.3275911 z), z >= 0: Abramowitz and Stegun, 7.1.26,
# absolute error 1.5e-7.
ERF_STEP = 0.3275911
ERF_POLYNOMIAL = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def gelu(x: Expr, lanes: int) -> Expr:
    """Compute x * Phi(x), Phi the normal distribution, on float32 vectors: 1e-7 |x| off at most."""

    def c(value: float) -> Expr:
        return e.const(value, "float32", lanes)

    x = e.let(x)
    size = e.let(e.llvm(f"float32x{lanes}" if lanes > 1 else "float32", "llvm.fabs", x))
    z = e.let(size * c(0.5**0.5))
    t = e.let(c(1.0) / (c(1.0) + z * c(ERF_STEP)))
    p = c(ERF_POLYNOMIAL[0])
    for coefficient in ERF_POLYNOMIAL[1:]:
        p = e.let(e.fma(p, t, c(coefficient), lanes))
    erf = e.let(c(1.0) - p * t * exp(c(0.0) - z * z, lanes))
    return e.let(c(0.5) * (x + size * erf))
