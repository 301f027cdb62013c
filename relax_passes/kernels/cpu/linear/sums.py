"""The sum of products of one row of x and one term of W, over columns of one group.

In 16-bit lanes as long as they hold it, where an instruction set adds products of bytes in pairs:
one addition of half as many bits for every four columns, and the rest once.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.spec import LinearSpec
from relax_passes.terms import Term


def narrow_steps(isa: Isa, term: Term) -> int:
    """Return how many times four columns of a term fit 16-bit lanes; 0 is never."""
    return 0 if term.table is None else isa.narrow_dots(max(term.table))


def scope(isa: Isa, spec: LinearSpec) -> Any:
    """Open what the sums of a linear need around them."""
    narrow = any(narrow_steps(isa, term) for term in isa.adapt(spec.terms))
    return isa.scope() if narrow else nullcontext()


class Sum:
    """A sum in a register variable, the 16-bit part of it in another.

    Parameters
    ----------
    isa : Isa
        Multiplies.
    most : int
        After so many calls of ``add`` 16-bit lanes have to be emptied; 0 uses none.
    start : Expr
        int32 of the rows of a vector, what the sum begins with.
    """

    def __init__(self, isa: Isa, most: int, start: Expr):
        self.isa, self.most, self.start = isa, most, start
        self.steps = 0
        if most:
            self.register = self._zero()
        else:
            self.register = e.Register("int32", isa.rows, start)

    def _zero(self) -> e.Register:
        lanes = 2 * self.isa.rows
        return e.Register("int16", lanes, e.const(0, "int16", lanes))

    def add(self, weights: Expr, activation: Expr) -> None:
        """Add the products of four columns."""
        total = self.register.get()
        if not self.most:
            self.register.set(self.isa.dot(total, weights, activation))
            return
        if self.steps == self.most:
            self.start, self.steps = e.let(self.get()), 0
            self.register = self._zero()
            total = self.register.get()
        self.register.set(self.isa.narrow_add(total, weights, activation))
        self.steps += 1

    def get(self) -> Expr:
        """Read the sum, int32."""
        total = self.register.get()
        return self.isa.widen(total) + self.start if self.most else total
