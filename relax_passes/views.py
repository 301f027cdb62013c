"""Tensors that are another one seen otherwise: reshaped, permuted, or a part of it.

A kernel that takes steps between elements reads such a tensor where it is, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from relax_passes.ops import is_op
from relax_passes.rewriting import Context

_RESHAPES = ("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten")


@dataclass(frozen=True)
class View:
    """A tensor as the elements of another.

    Attributes
    ----------
    base : relax.Expr
        The other, contiguous.
    offset : int or expression
        Its element that is the view's first.
    shape, steps : tuple
        Sizes, and elements of the base from one index to the next, of each axis.
    """

    base: relax.Expr
    offset: Any
    shape: tuple
    steps: tuple

    @staticmethod
    def of(ctx: Context, expr: relax.Expr) -> View:
        """Follow an expression to what it is a view of, in a function that is being rewritten."""
        value = ctx.value(expr)
        if is_op(value, "relax.permute_dims"):
            inner = View.of(ctx, value.args[0])
            axes = axes_of(value)
            shape, steps = (tuple(x[a] for a in axes) for x in (inner.shape, inner.steps))
            return View(inner.base, inner.offset, shape, steps)
        if any(is_op(value, name) for name in _RESHAPES):
            found = View.of(ctx, value.args[0])._reshaped(tuple(value.ty.shape.values))
            if found is not None:
                return found
        if isinstance(value, relax.TupleGetItem):
            split = ctx.value(value.tuple_value)
            if is_op(split, "relax.split"):
                return View.of(ctx, split.args[0])._part(split, value.index)
        shape = tuple(expr.ty.shape.values)
        return View(expr, 0, shape, contiguous(shape))

    def _part(self, split: relax.Call, index: int) -> View:
        axis = int(split.attrs.axis) % len(self.shape)
        before = [field.shape.values[axis] for field in split.ty.fields[:index]]
        offset = self.offset + sum(before, 0) * self.steps[axis]
        shape = tuple(split.ty.fields[index].shape.values)
        return View(self.base, _simple(offset), shape, self.steps)

    def _reshaped(self, shape: tuple) -> View | None:
        """See the same elements in another shape, where their steps allow it."""
        left = [(n, step) for n, step in zip(self.shape, self.steps, strict=True) if not _is(n, 1)]
        wanted = [n for n in shape if not _is(n, 1)]
        steps: list[Any] = []
        while left or wanted:
            found = _group([n for n, _ in left], wanted)
            if found is None:
                return None
            old, new = left[: found[0]], wanted[: found[1]]
            left, wanted = left[found[0] :], wanted[found[1] :]
            for (_, step), (n, inner) in zip(old, old[1:], strict=False):
                if not _is(step, n * inner):
                    return None
            made = contiguous(tuple(new), old[-1][1])
            steps += made
        every = iter(steps)
        return View(
            self.base, self.offset, shape, tuple(0 if _is(n, 1) else next(every) for n in shape)
        )


def axes_of(permute: relax.Call) -> list[int]:
    """Return the axes of a permute_dims, none negative."""
    count = len(permute.ty.shape.values)
    given = permute.attrs.axes
    return [int(a) % count for a in given] if given is not None else list(range(count))[::-1]


def contiguous(shape: tuple, last: Any = 1) -> tuple:
    """Return the steps of a tensor without gaps."""
    steps = [last]
    for n in shape[:0:-1]:
        steps.append(_simple(steps[-1] * n))
    return tuple(steps[::-1])[len(steps) - len(shape) :]


def whole_pieces(numbers: Sequence[Any], size: int) -> bool:
    """Whether all numbers are known to be multiples of a size."""
    return all(_is(tirx.floormod(_wide(n), tirx.const(size, "int64")), 0) for n in numbers)


def _group(old: list, new: list) -> tuple[int, int] | None:
    """Return how many leading sizes of each have the same product, the fewest."""
    product = 1
    for i, n in enumerate(old, 1):
        product, other = product * n, 1
        for j, m in enumerate(new, 1):
            other = other * m
            if _is(product, other):
                return i, j
    return None


def _wide(x: Any) -> Any:
    return x if isinstance(x, tirx.Expr) else tirx.const(x, "int64")


def _simple(x: Any) -> Any:
    return tvm.sym.Analyzer().simplify(x) if isinstance(x, tirx.Expr) else x


def _is(x: Any, y: Any) -> bool:
    return bool(tvm.sym.Analyzer().can_prove_equal(_wide(x), _wide(y)))
