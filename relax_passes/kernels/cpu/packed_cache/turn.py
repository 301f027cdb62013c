"""A Hadamard matrix over a head's channels, in vector registers.

The matrix is Sylvester's, orthonormal and symmetric, of the largest power of two that divides the
channels: sums and differences of channels whose numbers differ in one bit, for each bit.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.attention import vector as v


def turn_size(head_dim: int) -> int:
    """Return the size of the matrix for heads of so many channels."""
    return head_dim & -head_dim


def turned(row: list[Expr], size: int) -> list[Expr]:
    """Multiply vectors of consecutive channels by the matrix, in blocks of ``size`` channels."""
    for step in (1, 2, 4, 8):
        row = [_inside(value, step) for value in row]
    step = 1
    while step * v.LANES < size:
        row = [_across(row, i, step) for i in range(len(row))]
        step *= 2
    factor = v.const(size**-0.5)
    return [v.hold(value * factor, "turned") for value in row]


def _inside(value: Expr, step: int) -> Expr:
    """Add the lane whose number differs in one bit; where that bit is 1, subtract from it."""
    value = e.let(value, "lanes")
    other = T.Shuffle([value], [lane ^ step for lane in range(v.LANES)])
    signs = [tirx.const(-1.0 if lane & step else 1.0, "float32") for lane in range(v.LANES)]
    return v.hold(value * T.Shuffle(signs, list(range(v.LANES))) + other, "sum")


def _across(row: list[Expr], i: int, step: int) -> Expr:
    other = row[i ^ step]
    return v.hold(other - row[i] if i & step else row[i] + other, "sum")
