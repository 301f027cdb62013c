"""Find linears that follow each other with nothing but norms and quantization in between.

    quantize -> linear -> quantize -> linear -> ...      each read by the next one alone

Such a chain becomes one kernel where it runs on a few rows of x (kernels/chain.py): in the
functions that are called with no more (the attribute `ROWS`). What it computes for others, such as
the residual stream, it returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax

from relax_passes.ops import Linear, is_op, quantize_attrs
from relax_passes.rewriting import variables

QUANTIZE = "amx.quantize_activation"


@dataclass(frozen=True)
class Chain:
    """One chain, in the variables of the function as it was.

    Attributes
    ----------
    quantized : tuple of Var
        The quantizations in front of each linear.
    linears : tuple of Var
        The linears.
    residuals : tuple of int or None
        For each linear the earlier one whose result it adds, if it is one of the chain.
    kept : tuple of bool
        Whose results are read outside of the chain.
    signature : object
        Equal for chains that compute the same with other weights.
    """

    quantized: tuple[relax.Var, ...]
    linears: tuple[relax.Var, ...]
    residuals: tuple[int | None, ...]
    kept: tuple[bool, ...]
    signature: Any

    @property
    def inside(self) -> tuple[relax.Var, ...]:
        """The bindings that the last linear's takes the place of."""
        return (*self.quantized, *self.linears[:-1])


def find_chains(function: relax.Function, fits: Callable[[Linear], bool]) -> list[Chain]:
    """Return the chains of at least two linears for which ``fits`` holds.

    A chain is as much machine code as its linears, so one that occurs only once, that of the last
    layer with the head, is left as it is.
    """
    graph = _Graph(function)
    chains: list[Chain] = []
    taken: set[relax.Var] = set()
    for var in graph.values:
        if var in taken or not graph.fits(var, fits):
            continue
        found = [var]
        following = graph.next_linear(var)
        while following is not None and graph.fits(following, fits):
            found.append(following)
            following = graph.next_linear(following)
        chain = graph.chain(found)
        if chain is not None:
            chains.append(chain)
            taken.update(chain.linears)
    count = Counter(c.signature for c in chains)
    return [c for c in chains if count[c.signature] > 1]


class _Graph:
    """Who makes and who reads what in a function; plain aliases are looked through."""

    def __init__(self, function: relax.Function) -> None:
        self.values: dict[relax.Var, relax.Expr] = {}
        self.place: dict[relax.Var, int] = {}
        self.readers: dict[relax.Var, list[relax.Var]] = {}
        self.results: set[relax.Var] = set()
        self._aliases: dict[relax.Var, relax.Var] = {}
        bindings = [b for block in function.body.blocks for b in block.bindings]
        for i, binding in enumerate(bindings):
            if not isinstance(binding, relax.VarBinding):
                continue
            if isinstance(binding.value, relax.Var):
                self._aliases[binding.var] = self.real(binding.value)
                continue
            self.values[binding.var], self.place[binding.var] = binding.value, i
            for read in self._variables(binding.value):
                self.readers.setdefault(read, []).append(binding.var)
        self.results.update(self._variables(function.body.body))

    def real(self, var: Any) -> Any:
        """Return the variable behind an alias."""
        return self._aliases.get(var, var) if isinstance(var, relax.Var) else var

    def _variables(self, expr: relax.Expr) -> list[relax.Var]:
        return [self.real(var) for var in variables(expr)]

    def linear(self, var: relax.Var) -> Linear | None:
        """Return the linear that is bound to a variable."""
        value = self.values.get(var)
        return Linear.of(value) if is_op(value, "amx.linear") else None

    def fits(self, var: relax.Var, fits: Callable[[Linear], bool]) -> bool:
        """Whether a variable is a linear that a chain may have."""
        linear = self.linear(var)
        return linear is not None and self.quantization(linear) is not None and fits(linear)

    def quantization(self, linear: Linear) -> relax.Var | None:
        """Return the quantization that this linear alone reads, of one input and maybe a norm."""
        parts = [self.values.get(self.real(x)) for x in linear.x]
        items = [p for p in parts if isinstance(p, relax.TupleGetItem)]
        sources = {self.real(p.tuple_value) for p in items}
        if len(items) != len(parts):
            return None
        if len(sources) != 1:
            return None
        made = sources.pop()
        call = self.values.get(made)
        if not is_op(call, QUANTIZE) or quantize_attrs(call).prologue not in ("none", "rms_norm"):
            return None
        readers = {r for part in self.readers[made] for r in self.readers.get(part, [])}
        return made if len(readers) == 1 else None

    def next_linear(self, var: relax.Var) -> relax.Var | None:
        """Return the linear that reads the quantized result of this one."""
        for reader in self.readers.get(var, []):
            value = self.values[reader]
            if not is_op(value, QUANTIZE) or not self.real(value.args[0]).same_as(var):
                continue
            for last in {r for part in self.readers[reader] for r in self.readers.get(part, [])}:
                if self.linear(last) is not None:
                    return last
        return None

    def chain(self, found: list[relax.Var]) -> Chain | None:
        """Make a chain of the most linears whose other readers all come behind it."""
        while len(found) > 1:
            linears = [self.linear(v) for v in found]
            quantized = [self.quantization(x) for x in linears if x is not None]
            inside = {*found, *quantized}
            outside = [[r for r in self.readers.get(v, []) if r not in inside] for v in found]
            if all(self.place[r] > self.place[found[-1]] for readers in outside for r in readers):
                adds = [self.real(x.residual) for x in linears if x is not None]
                attrs = tuple(replace(x.attrs, name="") for x in linears if x is not None)
                order = {v: i for i, v in enumerate(found)}
                residuals = tuple(None if a is None else order.get(a) for a in adds)
                kept = tuple(
                    bool(r) or v in self.results for v, r in zip(found, outside, strict=True)
                )
                made = tuple(q for q in quantized if q is not None)
                how = tuple(quantize_attrs(self.values[q]) for q in made)
                signature = (attrs, how, residuals, kept)
                return Chain(made, tuple(found), residuals, kept, signature)
            found = found[:-1]
        return None
