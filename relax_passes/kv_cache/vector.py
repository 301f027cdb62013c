"""Building blocks of the attention kernels: 16-wide vectors, and functions of them, in TensorIR.

Every kernel of this package is emitted with the IR builder and computes on logical vectors of 16
lanes, whatever the target: LLVM keeps one in an AVX-512 register, two AVX2 ones or four NEON ones.
What depends on the target is how many of them fit the register file (:class:`VectorTarget`).

Functions take and return expressions.  An expression that is used more than once should go
through :func:`bind`, which gives it a name in the emitted code and evaluates it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

LANES = 16
NEG_INF = -1e30  # score of a masked key; finite, so that differences never become NaN
EMPTY_LSE = -5e4  # log-sum-exp of no key at all, the value of TVM's own kernels


@dataclass(frozen=True)
class VectorTarget:
    """How many registers a kernel may plan with.

    Parameters
    ----------
    lanes : int
        float32 lanes of one hardware register: 16 (AVX-512), 8 (AVX2) or 4 (NEON, SSE).
    registers : int
        Number of vector registers: 32 (AVX-512, NEON) or 16 (AVX2, SSE).
    """

    lanes: int = 16
    registers: int = 32

    @property
    def vectors(self) -> int:
        """Logical 16-lane vectors that fit the register file."""
        return self.registers * self.lanes // LANES

    @staticmethod
    def of(target) -> VectorTarget:  # noqa: ANN001 - tvm.target.Target, dict or TargetInfo
        """Read the register file off a TVM target's features."""
        from ..schedules.base import TargetInfo

        info = TargetInfo.of(target)
        if info.has("avx512f"):
            return VectorTarget(16, 32)
        if info.has("avx2"):
            return VectorTarget(8, 16)
        return VectorTarget(4, 32 if info.arch == "aarch64" else 16)


def bind(value: Expr, name: str = "x") -> Expr:
    """Evaluate an expression once, at this point of the emitted code."""
    return IRBuilder.name(name, T.Bind(value))


def const(value: float, lanes: int = LANES, dtype: str = "float32") -> Expr:
    """Make a vector of one constant."""
    return T.Broadcast(tirx.const(value, dtype), lanes)


def splat(value: Expr, lanes: int = LANES) -> Expr:
    """Repeat a scalar in all lanes."""
    return T.Broadcast(value, lanes)


def cast(value: Expr, dtype: str, lanes: int = LANES) -> Expr:
    """Convert a vector's lanes to another type."""
    return tirx.Cast(f"{dtype}x{lanes}" if lanes > 1 else dtype, value)


def opaque(value: Expr, name: str = "x", lanes: int = 1) -> Expr:
    """Evaluate an expression once and hide how it was made from TVM's analysis.

    TVM's simplifier puts the definition of a bound variable in place of its uses, so chains of
    them grow exponentially, and bounds proofs over computed divisors take seconds.  Passing
    through memory stops both; LLVM removes the detour.
    """
    dtype = str(value.ty.dtype).split("x")[0]
    buffer = IRBuilder.name(name, T.alloc_buffer((lanes,), dtype))
    index = T.Ramp(0, 1, lanes) if lanes > 1 else 0
    T.buffer_store(buffer, value, [index])
    return tirx.BufferLoad(buffer, [index])


def hold(value: Expr, name: str = "x") -> Expr:
    """Apply :func:`opaque` to a 16-lane vector."""
    return opaque(value, name, LANES)


def div(a: Expr, b: Expr | int) -> Expr:
    """Quotient of non-negative integers (floor division costs TVM's passes a proof each time)."""
    return tirx.truncdiv(a, b)


def mod(a: Expr, b: Expr | int) -> Expr:
    """Remainder of non-negative integers."""
    return tirx.truncmod(a, b)


def ceil_div(a: Expr, b: Expr | int) -> Expr:
    """Quotient of non-negative integers, rounded up."""
    return tirx.truncdiv(a + (b - 1), b)


def load(buffer, indices: Sequence, lanes: int = LANES) -> Expr:  # noqa: ANN001
    """Load consecutive elements along the last axis, as float32."""
    *outer, last = indices
    value = tirx.BufferLoad(buffer, [*outer, T.Ramp(last, 1, lanes)])
    return cast(value, "float32", lanes) if buffer.dtype == "float16" else value


def store(buffer, value: Expr, indices: Sequence, lanes: int = LANES) -> None:  # noqa: ANN001
    """Store a float32 vector along the last axis, rounded to the buffer's type."""
    *outer, last = indices
    if buffer.dtype == "float16":
        value = cast(value, "float16", lanes)
    T.buffer_store(buffer, value, [*outer, T.Ramp(last, 1, lanes)])


def load_scalar(buffer, indices: Sequence) -> Expr:  # noqa: ANN001
    """Load one element, as float32 if it is a float16."""
    value = tirx.BufferLoad(buffer, list(indices))
    return value.astype("float32") if buffer.dtype == "float16" else value


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """Multiply and add, fused by LLVM where the target can (TVM allows contraction)."""
    return a * b + c


def prefetch(buffer, indices: Sequence) -> None:  # noqa: ANN001
    """Ask for the cache line of an element, for reading, into all levels."""
    address = tirx.address_of(tirx.BufferLoad(buffer, list(indices)))
    flags = [tirx.const(f, "int32") for f in (0, 3, 1)]
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *flags))


NO_INLINE_ROPE = "the CPU kernels do not rotate inside attention: use the normal RoPE mode"


def require(condition: Expr, message: str) -> None:
    """Emit a check that raises when the kernel is called with something it cannot do."""
    with T.Assert(condition, message):
        pass


def dealt_out():  # noqa: ANN201 - a frame
    """Give the iterations of the parallel loop inside to the threads in turn, not in blocks.

    Consecutive items cost alike more often than items far apart do, so that every thread gets
    its share of the long ones.
    """
    return T.attr({"pragma_parallel_launch_point": 1, "pragma_parallel_stride_pattern": 1})


class Register:
    """A mutable float32 vector that LLVM keeps in a register.

    It is a stack buffer of its own: TVM leaves buffers below 1 KiB on the stack, and LLVM
    promotes one that is only accessed as a whole vector.  An array of accumulators in one buffer
    would pass that limit and live in memory.
    """

    def __init__(self, init: Expr, name: str = "r") -> None:
        self.buffer = IRBuilder.name(name, T.alloc_buffer((LANES,), "float32"))
        self.set(init)

    def get(self) -> Expr:
        """Return the current value."""
        return tirx.BufferLoad(self.buffer, [T.Ramp(0, 1, LANES)])

    def set(self, value: Expr) -> None:
        """Replace the value."""
        T.buffer_store(self.buffer, value, [T.Ramp(0, 1, LANES)])


def scratch(name: str, *shape: Expr | int):  # noqa: ANN201 - tirx.Buffer
    """Allocate a float32 array for the current scope: below 1 KiB on the stack."""
    return IRBuilder.name(name, T.alloc_buffer(shape, "float32"))


def reduce_lanes(value: Expr, op: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine all 16 lanes with a commutative operation; every lane of the result holds it."""
    for step in (8, 4, 2, 1):
        value = bind(value, "lanes")
        value = op(value, T.Shuffle([value], [lane ^ step for lane in range(LANES)]))
    return bind(value, "lanes")


def first_lane(value: Expr) -> Expr:
    """Extract lane 0."""
    return T.Shuffle([value], [0])


def polynomial(x: Expr, coefficients: Sequence[float], dtype: str = "float32") -> Expr:
    """Evaluate c0 + c1 x + c2 x^2 + ... by Horner's rule."""
    result = const(coefficients[-1], dtype=dtype)
    for c in reversed(coefficients[:-1]):
        result = fma(result, x, const(c, dtype=dtype))
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
    near = fma(polynomial(square, _TANH) * square, x, x)
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
    return fma(s * const(2 / math.log(2)), series, cast(e, "float32"))


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
    shifted = fma(x, const(2 / math.pi, dtype="float64"), const(_ROUND64, dtype="float64"))
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
    return hold(sine, "sine"), bind(cosine, "cosine")
