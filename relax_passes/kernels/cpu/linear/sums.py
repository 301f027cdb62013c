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
    """Return how many times four columns of a term fit 16-bit lanes; 0 is never.

    Eight-bit weights are two nibbles then.
    """
    largest = 15 if term.table is None else max(term.table)
    return 0 if isa.pairs is None else isa.pairs.dots(largest)


def scope(isa: Isa, spec: LinearSpec) -> Any:
    """Open what the sums of a linear need around them."""
    if isa.pairs is None or not any(narrow_steps(isa, t) for t in isa.adapt(spec.terms)):
        return nullcontext()
    return isa.pairs.scope()


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
    nibbles : bool
        16-bit lanes take low and high nibbles of weights apart.
    """

    def __init__(self, isa: Isa, most: int, start: Expr, nibbles: bool = False):
        self.isa, self.most, self.start = isa, most, start
        self.pairs: Any = isa.pairs
        self.steps = 0
        self.register = None if most else e.Register("int32", isa.rows, start)
        self.narrow: list[e.Register] = []
        if most:
            self.empty(2 if nibbles else 1)

    def empty(self, count: int) -> None:
        """Set the 16-bit parts to 0: one, or those of low and high nibbles."""
        lanes = 2 * self.isa.rows
        zero = e.const(0, "int16", lanes)
        self.narrow = [e.Register("int16", lanes, zero) for _ in range(count)]

    def add(self, weights: Any, activation: Expr) -> None:
        """Add the products of four columns; ``weights`` may be a tuple of nibbles."""
        if self.register is not None:
            self.register.set(self.isa.dot(self.register.get(), weights, activation))
            return
        if self.steps == self.most:
            self.start, self.steps = e.let(self.get()), 0
            self.empty(len(self.narrow))
        parts = weights if isinstance(weights, tuple) else (weights,)
        for register, part in zip(self.narrow, parts, strict=True):
            register.set(self.pairs.add(register.get(), part, activation))
        self.steps += 1

    def get(self) -> Expr:
        """Read the sum, int32."""
        if self.register is not None:
            return self.register.get()
        low, *high = (e.let(self.pairs.widen(register.get())) for register in self.narrow)
        for more in high:
            low = low + (more << e.const(4, "int32", self.isa.rows))
        return low + self.start
