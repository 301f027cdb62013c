"""Loops of one block in TensorIR: a row's pieces in registers, sums and maxima over lanes."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from ..intrinsics.base import hold

Combine = Callable[[tirx.Expr, tirx.Expr], tirx.Expr]
Emit = Callable[[], None]
PIECE = 8  # numbers of a 16-byte access


def shuffle(value: tirx.Expr, mask: int) -> tirx.Expr:
    """Value of the lane whose number differs in the bits of `mask`."""
    everyone = tirx.const(0xFFFFFFFF, "uint32")
    return T.tvm_warp_shuffle_xor(everyone, value, mask, 32, 32)


def over_lanes(value: tirx.Expr, lanes: int, combine: Combine) -> tirx.Expr:
    """Combine the values of `lanes` neighbouring lanes, the nearest first; all get the result."""
    mask = 1
    while mask < lanes:
        value = hold(combine(value, shuffle(value, mask)))
        mask *= 2
    return value


def over_block(value: tirx.Expr, warps: int, tid: tirx.Expr, combine: Combine) -> tirx.Expr:
    """Combine the values of all threads of a block of `warps`; all get the result."""
    for mask in (16, 8, 4, 2, 1):
        value = hold(combine(value, shuffle(value, mask)))
    if warps == 1:
        return value
    shared = T.sblock_alloc_buffer((warps,), str(value.ty.dtype), scope="shared")
    with T.If(tirx.EQ(tid % 32, 0)):
        with T.Then():
            T.buffer_store(shared, value, [tid // 32])
    T.evaluate(T.tvm_storage_sync("shared"))
    total = shared[0]
    for warp in range(1, warps):
        total = combine(total, shared[warp])
    return hold(total)


class Pieces:
    """Pieces of 8 float16 of a row, a thread every `threads`-th, beyond the row's end none."""

    def __init__(self, count: int, threads: int, tid: tirx.Expr):
        self.count, self.threads, self.tid = count, threads, tid
        self.each = -(-count // threads)
        self._halves = T.sblock_alloc_buffer((PIECE,), "float16", scope="local")

    def _inside(self, p: int, emit: Emit, otherwise: Emit | None = None) -> None:
        """Emit what is for the threads that have a piece p, and what is for the others."""
        if (p + 1) * self.threads <= self.count:
            emit()
            return
        with T.If(self.tid + p * self.threads < self.count):
            with T.Then():
                emit()
            if otherwise is not None:
                with T.Else():
                    otherwise()

    def load(self, p: int, buffer: tirx.Buffer, row: tuple, to: tirx.Buffer, first: int) -> None:
        """Read piece p of buffer[row] as float32 into registers to[first..]; 0 beyond the end."""
        start = (self.tid + p * self.threads) * PIECE

        def read() -> None:
            with T.vectorized(PIECE) as j:
                T.buffer_store(self._halves, buffer[(*row, start + j)], [j])
            for j in range(PIECE):
                T.buffer_store(to, tirx.Cast("float32", self._halves[j]), [first + j])

        def nothing() -> None:
            for j in range(PIECE):
                T.buffer_store(to, tirx.const(0.0, "float32"), [first + j])

        self._inside(p, read, nothing)

    def store(
        self, p: int, buffer: tirx.Buffer, row: tuple, source: tirx.Buffer, first: int
    ) -> None:
        """Write registers source[first..] as piece p of buffer[row], rounded to float16."""
        start = (self.tid + p * self.threads) * PIECE

        def write() -> None:
            for j in range(PIECE):
                T.buffer_store(self._halves, tirx.Cast("float16", source[first + j]), [j])
            with T.vectorized(PIECE) as j:
                T.buffer_store(buffer, self._halves[j], [*row, start + j])

        self._inside(p, write)
