"""A thin layer over TVM's IR builder for vector code.

Kernels here are straight-line vector arithmetic inside a few loops.  ``function`` opens a PrimFunc,
``let`` names a value (so that TIR never duplicates it), ``Register`` is a loop-carried vector.

TVM 0.27: an allocation of scope "global" under 1 KiB becomes a stack slot, which LLVM promotes to
registers when every access is a whole vector at a constant index; scope "local" would call the
workspace allocator in the loop.  Hence one small buffer per register.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I  # noqa: E741, N812 - TVM's own spelling

Expr = Any  # a tirx expression; TVM's Python types do not help a checker here

parallel, serial, unroll = I.parallel, I.serial, I.unroll


@contextmanager
def function(
    name: str,
    buffers: Sequence[tuple[str, tuple, str]],
    m: int | None,
) -> Iterator[tuple[dict[str, Any], Expr]]:
    """Open a PrimFunc with the given buffers; yields ({name: buffer}, M) and builds on exit.

    A leading ``None`` in a shape stands for M, symbolic when ``m`` is None.  The finished function
    is the ``func`` entry of the dictionary.  Buffers of weights are taken as 64-byte aligned, the
    others only as aligned to their element.
    """
    with IRBuilder() as builder:
        with I.prim_func(s_tir=True):
            I.func_name(name)
            I.func_attr(
                {"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8}  # opaque
            )
            rows = I.int64() if m is None else m
            handles = [I.arg(f"{b[0]}_handle", I.handle()) for b in buffers]
            out: dict[str, Any] = {}
            for handle, (label, shape, dtype) in zip(handles, buffers, strict=True):
                full = tuple(rows if s is None else s for s in shape)
                bytes_ = tvm.DataType(dtype).bits // 8
                align = 64 if label.startswith("w_") else bytes_
                out[label] = I.match_buffer(handle, full, dtype, align=align)
            m_value = let(tirx.Cast("int32", rows)) if m is None else tirx.const(m, "int32")
            yield out, m_value
    out["func"] = builder.get()


def region() -> Any:
    """Open a parallel region of several loops, which every thread runs from front to end.

    Its ``parallel`` loops are shared out to the threads; what is outside of them each thread does.
    """
    return I.attr({"pragma_parallel_launch_point": 1})


def barrier_behind() -> Any:
    """Open a part of a region behind which all threads wait for each other."""
    return I.attr({"pragma_parallel_barrier_when_finish": 1})


@contextmanager
def parallel_rows(m: Expr) -> Iterator[Expr]:
    """Open a parallel loop over M rows in a region.

    A loop of one iteration would be no loop to TVM, and every thread would run its body.
    """
    if not isinstance(m, tirx.IntImm) or int(m) > 1:
        with parallel(0, m) as row:
            yield row
    else:
        with parallel(0, 2) as row, when(row < m), then():
            yield row


def one_thread() -> Any:
    """Open a part of a region that one thread runs."""
    return parallel_rows(tirx.const(1, "int32"))


def let(value: Expr, name: str = "") -> Expr:
    """Bind a value to a name in the current scope and return the name."""
    return _named(I.Bind(value), name)


def _named(made: Any, name: str) -> Any:
    """Give what was made a name in printed IR."""
    return IRBuilder.name(name, made) if name else made


def const(value: float, dtype: str = "int32", lanes: int = 1) -> Expr:
    """Build a scalar constant, or the vector that repeats it."""
    scalar = tirx.const(value, dtype)
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def splat(value: Expr, lanes: int) -> Expr:
    """Repeat a scalar in every lane."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def _last(index: Expr, lanes: int) -> Expr:
    return index if lanes == 1 else tirx.Ramp(index, 1, lanes)


def load(buffer: Any, *index: Expr, lanes: int = 1) -> Expr:
    """Load ``lanes`` neighbours along the last axis."""
    return tirx.BufferLoad(buffer, [*index[:-1], _last(index[-1], lanes)])


def store(buffer: Any, value: Expr, *index: Expr, lanes: int = 1) -> None:
    """Store ``lanes`` neighbours along the last axis."""
    I.buffer_store(buffer, value, [*index[:-1], _last(index[-1], lanes)])


def scratch(size: int, dtype: str, name: str = "") -> Any:
    """Allocate a small flat buffer on the stack (keep it under 1 KiB)."""
    return _named(I.alloc_buffer((size,), dtype), name)


def workspace(shape: tuple[int, ...], dtype: str) -> Any:
    """Allocate a larger buffer from the runtime's pool."""
    return I.alloc_buffer(shape, dtype)


def arena(parts: Sequence[tuple[tuple[int, ...], str]]) -> list[Any]:
    """Allocate buffers of (shape, dtype) out of one workspace, each at a multiple of 64 bytes."""
    starts, size = [], 1024  # never so small that it would be on the stack of one thread
    for shape, dtype in parts:
        starts.append(size)
        size += -(-math.prod(shape) * _bytes(dtype) // 64) * 64
    base = I.alloc_buffer((size,), "uint8")
    return [
        I.decl_buffer(shape, dtype, data=base.data, elem_offset=start // _bytes(dtype))
        for start, (shape, dtype) in zip(starts, parts, strict=True)
    ]


def _bytes(dtype: str) -> int:
    return tvm.DataType(dtype).bits // 8


def clamped(value: Expr, largest: int) -> Expr:
    """Limit an index."""
    return tirx.min(value, tirx.const(largest, "int32"))


def scratch_rows(rows: int, size: int) -> list[Any]:
    """Allocate one small float32 stack buffer a row."""
    return [scratch(size, "float32") for _ in range(rows)]


def llvm(dtype: str, name: str, *args: Expr) -> Expr:
    """Call an LLVM intrinsic without side effects."""
    return tirx.call_llvm_pure_intrin(dtype, name, *args)


def prefetch(buffer: Any, *index: Expr, write: bool = False, level: int = 1) -> None:
    """Ask for the cache line of an element, to cache ``level`` 1 or 2; out of range is harmless.

    To write into a line that another core has, or nobody, takes as long as to read it, and stores
    wait for each other: a line that will be written is better asked for early.
    """
    address = tirx.address_of(tirx.BufferLoad(buffer, list(index)))
    flags = [tirx.const(v, "int32") for v in (int(write), 4 - level, 1)]
    I.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *flags))


def cast(value: Expr, dtype: str, lanes: int = 1) -> Expr:
    """Convert values, lane by lane."""
    return tirx.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def bits(value: Expr, dtype: str, lanes: int = 1) -> Expr:
    """Reinterpret the bits of a scalar or vector."""
    return tirx.reinterpret(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def fma(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """Compute a * b + c on float32, fused where the target has an instruction for it."""
    return llvm("float32" if lanes == 1 else f"float32x{lanes}", "llvm.fmuladd", a, b, c)


def when(condition: Expr) -> Any:
    """Open an ``if``; use as ``with when(c), then(): ...``."""
    return I.If(condition)


def require(condition: Expr, message: str) -> None:
    """Emit a check that raises where the kernel is called with something it cannot do."""
    with I.Assert(condition, message):
        pass


def unlikely(count: Expr) -> Expr:
    """Return an int32 that LLVM may expect to be 0: registers spill where it is not."""
    return llvm("int32", "llvm.expect", count, const(0))


def llvm_text(text: str) -> Any:
    """Open a scope in which functions defined by LLVM text can be called.

    The text becomes one line: TVM's printer takes others out of the text that it prints, which then
    cannot be parsed.
    """
    return I.attr(tirx.const(0, "int32"), "pragma_import_llvm", " ".join(text.split()))


then, otherwise = I.Then, I.Else


class Register:
    """A vector (or scalar) variable that may change inside loops."""

    def __init__(self, dtype: str, lanes: int, initial: Expr | None = None, name: str = ""):
        self.lanes = lanes
        self.buffer = scratch(lanes, dtype, name)
        if initial is not None:
            self.set(initial)

    def get(self) -> Expr:
        """Read the variable."""
        return load(self.buffer, 0, lanes=self.lanes)

    def set(self, value: Expr) -> None:
        """Assign the variable."""
        store(self.buffer, value, 0, lanes=self.lanes)


def opaque(value: Expr, dtype: str, lanes: int = 1) -> Expr:
    """Name a value through a register variable, which hides its expression from TVM's analysis.

    TVM 0.27's simplifier follows named selects through both branches at every use; a chain of ten
    takes it minutes.
    """
    return let(Register(dtype, lanes, value).get())
