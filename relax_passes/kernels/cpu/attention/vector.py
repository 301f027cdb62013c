"""Building blocks of the attention kernels: 16-wide vectors in TensorIR.

Every kernel of this package is emitted with the IR builder and computes on logical vectors of 16
lanes, whatever the target: LLVM keeps one in an AVX-512 register, two AVX2 ones or four NEON ones.
What depends on the target is how many of them fit the register file (:class:`VectorTarget`).

Functions take and return expressions.  An expression that is used more than once should go
through :func:`bind`, which gives it a name in the emitted code and evaluates it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

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


def bind(value: Expr, name: str = "x") -> Expr:
    """Evaluate an expression once, at this point of the emitted code."""
    return IRBuilder.name(name, T.Bind(value))


def const(value: float, lanes: int = LANES, dtype: str = "float32") -> Expr:
    """Make a vector of one constant."""
    return splat(tirx.const(value, dtype), lanes)


def splat(value: Expr, lanes: int = LANES) -> Expr:
    """Repeat a scalar in all lanes."""
    return T.Broadcast(value, lanes) if lanes > 1 else value


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


def _run(first: Expr, lanes: int) -> Expr:
    """Return the indices of consecutive elements; of one element its index."""
    return T.Ramp(first, 1, lanes) if lanes > 1 else first


def load(buffer, indices: Sequence, lanes: int = LANES) -> Expr:  # noqa: ANN001
    """Load consecutive elements along the last axis, as float32."""
    *outer, last = indices
    value = tirx.BufferLoad(buffer, [*outer, _run(last, lanes)])
    return cast(value, "float32", lanes) if buffer.dtype == "float16" else value


def store(buffer, value: Expr, indices: Sequence, lanes: int = LANES) -> None:  # noqa: ANN001
    """Store a float32 vector along the last axis, rounded to the buffer's type."""
    *outer, last = indices
    if buffer.dtype == "float16":
        value = cast(value, "float16", lanes)
    T.buffer_store(buffer, value, [*outer, _run(last, lanes)])


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


def region():  # noqa: ANN201 - a frame
    """Open a parallel region of several loops; each thread takes a run of iterations of each."""
    return T.attr({"pragma_parallel_launch_point": 1})


def barrier_behind():  # noqa: ANN201 - a frame
    """Open a part of a parallel region behind which all threads wait for each other."""
    return T.attr({"pragma_parallel_barrier_when_finish": 1})


def over_tokens(n: Expr, body: Callable[[Expr], None]) -> None:
    """Run ``body(token)`` for n tokens: on one thread when they are few.

    Threads take runs of tokens. Token t of a batch is sequence t, and attention gives a thread the
    same run of sequences: it finds the queries and keys that it made itself in its own cache.
    """
    with T.If(n < FEW_TOKENS):
        with T.Then(), T.serial(0, n) as t:
            body(t)
        with T.Else(), T.parallel(0, n) as t:
            body(t)


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


def counter(name: str):  # noqa: ANN201 - tirx.Buffer
    """Allocate an int32 variable that starts at 0."""
    buffer = IRBuilder.name(name, T.alloc_buffer((1,), "int32"))
    T.buffer_store(buffer, 0, [0])
    return buffer


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
