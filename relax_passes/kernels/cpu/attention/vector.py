"""Building blocks of the attention kernels: 16-wide vectors in TensorIR.

Every kernel of this package is emitted with the IR builder and computes on logical vectors of 16
lanes, whatever the target: LLVM keeps one in an AVX-512 register, two AVX2 ones or four NEON ones.
What depends on the target is how many of them fit the register file (:class:`VectorTarget`).

These are the words of ``kernels/cpu/emit.py`` for that width and for caches of two types.  An
expression that is used more than once should go through ``emit.let``, which evaluates it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from relax_passes.kernels.cpu import emit as e

LANES = 16
NEG_INF = -1e30  # score of a masked key; finite, so that differences never become NaN
FEW_TOKENS = 4  # below this, waking the other threads costs more than it saves
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
        from relax_passes.kernels.base import TargetInfo

        info = TargetInfo.of(target)
        if info.has("avx512f"):
            return VectorTarget(16, 32)
        if info.has("avx2"):
            return VectorTarget(8, 16)
        return VectorTarget(4, 32 if info.arch == "aarch64" else 16)


def const(value: float, lanes: int = LANES, dtype: str = "float32") -> Expr:
    """Make a vector of one constant."""
    return e.const(value, dtype, lanes)


def splat(value: Expr) -> Expr:
    """Repeat a scalar in all lanes."""
    return e.splat(value, LANES)


def cast(value: Expr, dtype: str) -> Expr:
    """Convert a vector's lanes to another type."""
    return e.cast(value, dtype, LANES)


def opaque(value: Expr, name: str = "x", lanes: int = 1) -> Expr:
    """Evaluate an expression once and hide how it was made from TVM's analysis.

    TVM's simplifier puts the definition of a bound variable in place of its uses, so chains of
    them grow exponentially, and bounds proofs over computed divisors take seconds.  Passing
    through memory stops both; LLVM removes the detour.
    """
    dtype = str(value.ty.dtype).split("x")[0]
    return e.Register(dtype, lanes, value, name).get()


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
    value = e.load(buffer, *indices, lanes=lanes)
    return e.cast(value, "float32", lanes) if buffer.dtype == "float16" else value


def store(buffer, value: Expr, indices: Sequence, lanes: int = LANES) -> None:  # noqa: ANN001
    """Store a float32 vector along the last axis, rounded to the buffer's type."""
    if buffer.dtype == "float16":
        value = e.cast(value, "float16", lanes)
    e.store(buffer, value, *indices, lanes=lanes)


NO_INLINE_ROPE = "the CPU kernels do not rotate inside attention: use the normal RoPE mode"


def scalar_arguments() -> tuple[Expr, Expr]:
    """Declare the last arguments of TVM's attention kernels; return rotary_mode and sm_scale."""
    rotary_mode = T.arg("rotary_mode", T.int32())
    T.arg("rope_scale", T.float32())
    T.arg("rope_theta", T.float32())
    return rotary_mode, T.arg("sm_scale", T.float32())


def function(name: str) -> None:
    """Name the function that is being built."""
    T.func_name(name)
    T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})


def over_tokens(n: Expr, body: Callable[[Expr], None], few: Expr | None = None) -> None:
    """Run ``body(token)`` for n tokens: on one thread when they are few.

    Threads take runs of tokens. Token t of a batch is sequence t, and attention gives a thread the
    same run of sequences: it finds the queries and keys that it made itself in its own cache.
    """
    with T.If(n < FEW_TOKENS if few is None else few):
        with T.Then(), T.serial(0, n) as t:
            body(t)
        with T.Else(), T.parallel(0, n) as t:
            body(t)


class Register(e.Register):
    """A variable of 16 float32 lanes."""

    def __init__(self, initial: Expr, name: str = "r") -> None:
        super().__init__("float32", LANES, initial, name)


def counter(name: str):  # noqa: ANN201 - tirx.Buffer
    """Allocate an int32 variable that starts at 0."""
    return e.Register("int32", 1, tirx.const(0, "int32"), name).buffer


def scratch(name: str, *shape: Expr | int):  # noqa: ANN201 - tirx.Buffer
    """Allocate a float32 array for the current scope: below 1 KiB on the stack."""
    return IRBuilder.name(name, T.alloc_buffer(shape, "float32"))


def reduce_lanes(value: Expr, op: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine all 16 lanes with a commutative operation; every lane of the result holds it."""
    for step in (8, 4, 2, 1):
        value = e.let(value, "lanes")
        value = op(value, T.Shuffle([value], [lane ^ step for lane in range(LANES)]))
    return e.let(value, "lanes")


def first_lane(value: Expr) -> Expr:
    """Extract lane 0."""
    return T.Shuffle([value], [0])
