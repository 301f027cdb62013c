"""Loops of nothing but products in registers: what a CPU's arithmetic gives at most.

The shape is that of a panel's inner loop: rows of x stay in registers, two vectors of W are loaded
a step and multiplied with each of them.

    w_codes  uint8 [16, bytes of a vector]
    x        int8 [rows, 4]
    y        of the sums' type [rows, 2 * lanes]
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import tvm

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.isa.neon import NeonMatrix

STEPS = 1 << 16  # of a call
_HELD = 16  # vectors of W, which any first cache holds
_WIDE = 2  # of them a step


@dataclass(frozen=True)
class Peak:
    """A loop, its buffers as (shape, dtype), and the multiplications and additions of a call."""

    func: tvm.tirx.PrimFunc
    buffers: tuple[tuple[tuple[int, int], str], ...]
    operations: int


def byte_products(isa: Isa) -> Peak:
    """Build the loop of products of bytes, by the quickest instruction that kernels here use."""

    def x(buffer: Any, row: int) -> Expr:
        return isa.activation(buffer, row, 0)

    every = 2 * isa.bytes
    if isinstance(isa, NeonMatrix):
        return _loop(isa, ("int32", isa.rows), x, _signed, isa.matrix_dot, 2 * every)
    if isa.pairs is None:
        return _loop(isa, ("int32", isa.rows), x, isa.prepare, isa.dot, every)
    with_scope = isa.pairs.scope()
    return _loop(isa, ("int16", 2 * isa.rows), x, isa.prepare, isa.pairs.add, every, with_scope)


def float_products(isa: Isa) -> Peak:
    """Build the loop of float32 products, of buffers that hold the bytes of float32 numbers."""

    def x(buffer: Any, row: int) -> Expr:
        return e.let(e.splat(e.bits(e.load(buffer, row, 0, lanes=4), "float32"), isa.rows))

    def w(packed: Expr) -> Expr:
        return e.let(e.bits(packed, "float32", isa.rows))

    def add(total: Expr, weights: Expr, activation: Expr) -> Expr:
        return e.fma(weights, activation, total, isa.rows)

    return _loop(isa, ("float32", isa.rows), x, w, add, 2 * isa.rows)


def _signed(packed: Expr) -> Expr:
    return e.let(e.bits(packed, "int8", 16))


def _loop(
    isa: Isa,
    sums: tuple[str, int],
    x: Callable[[Any, int], Expr],
    w: Callable[[Expr], Any],
    add: Callable[[Expr, Any, Expr], Expr],
    operations: int,
    scope: Any = None,
) -> Peak:
    """Build a loop whose every step adds products of two vectors with every row of x.

    ``sums`` are the sums' type and lanes, and ``operations`` those of one ``add``.
    """
    rows, (dtype, lanes) = isa.block[0], sums
    shapes = (
        ("w_codes", (_HELD, isa.bytes), "uint8"),
        ("x", (rows, 4), "int8"),
        ("y", (rows, _WIDE * lanes), dtype),
    )
    with e.function("peak", shapes, 1) as (buffers, _), scope or nullcontext():
        held = [x(buffers["x"], row) for row in range(rows)]
        zero = e.const(0, dtype, lanes)
        totals = [[e.Register(dtype, lanes, zero) for _ in range(_WIDE)] for _ in held]
        with e.serial(0, STEPS) as step:
            for number in range(_WIDE):
                place = e.let((step * _WIDE + number) & (_HELD - 1))
                weights = w(e.let(e.load(buffers["w_codes"], place, 0, lanes=isa.bytes)))
                for row, activation in enumerate(held):
                    total = totals[row][number]
                    total.set(add(total.get(), weights, activation))
        for row, own in enumerate(totals):
            for number, total in enumerate(own):
                e.store(buffers["y"], total.get(), row, number * lanes, lanes=lanes)
    a_call = STEPS * _WIDE * rows * operations
    return Peak(buffers["func"], tuple((shape, dtype) for _, shape, dtype in shapes), a_call)
