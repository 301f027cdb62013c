"""Linears that follow each other without anything but norms and quantization in between.

A decoder layer behind attention is such a chain: output projection, gate and up, down, and the next
layer's query/key/value projection.  One kernel that computes all of it starts the threads once and
keeps what passes between the linears to itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from relax_passes.activation import Activation
from relax_passes.spec import LinearSpec

MOST_ROWS = 15  # of x; more of them run linear by linear


@dataclass(frozen=True)
class Quantization:
    """How a linear's input is quantized, as ``activations.quantize`` says it.

    Attributes
    ----------
    scheme : Activation
        The linear's activations.
    prologue : str
        "none", or "rms_norm", whose weight is an argument of the chain.
    eps : float
        RMSNorm's epsilon.
    """

    scheme: Activation
    prologue: str = "none"
    eps: float = 0.0


@dataclass(frozen=True)
class ChainSpec:
    """What a chain computes; the arguments of its kernel are ``buffers()``.

    Parameters
    ----------
    stages : tuple of LinearSpec
        The linears. M is either the same constant everywhere, or None: then it must not exceed
        `MOST_ROWS`.
    quantized : tuple of Quantization
        What is in front of each linear.
    source : str
        Type of x: "float32" or "float16".
    residuals : tuple of int or None
        For each stage the earlier one whose result it adds; None where it adds an argument (its
        spec says so) or nothing.
    kept : tuple of bool
        Which stages' float results are results of the chain.
    """

    stages: tuple[LinearSpec, ...]
    quantized: tuple[Quantization, ...]
    source: str
    residuals: tuple[int | None, ...]
    kept: tuple[bool, ...]
    m: int | None = None

    @cached_property
    def name(self) -> str:
        """A name for the function: shapes of the linears."""
        head = self.stages[0]
        shapes = "_".join(f"n{s.n}k{s.k}" for s in self.stages)
        rows = "few" if self.m is None else f"m{self.m}"
        name = f"chain_{head.format}_{head.activation}_{shapes}_{rows}"
        return "".join(c if c.isalnum() else "_" for c in name)

    def stage_arguments(self, i: int) -> tuple[tuple[str, tuple, str], ...]:
        """List (name, shape, dtype) of what stage ``i`` takes from outside, in order."""
        spec = self.stages[i]
        inner = {name for name, _, _ in spec.activation_buffers()} | {"y"}
        if self.residuals[i] is not None:
            inner.add("residual")
        norm = [("norm", (spec.k,), "float32")] if self.quantized[i].prologue == "rms_norm" else []
        return (*norm, *(b for b in spec.buffers() if b[0] not in inner))

    def buffers(self) -> tuple[tuple[str, tuple, str], ...]:
        """List (name, shape, dtype) of all arguments in order; a leading None is M.

        x, then for each stage the norm's weight, its own weights and what else it takes, named
        "<name>_<stage>", then the kept results.
        """
        args: list[tuple[str, tuple, str]] = [("x", (None, self.stages[0].k), self.source)]
        for i in range(len(self.stages)):
            args += [(f"{name}_{i}", s, d) for name, s, d in self.stage_arguments(i)]
        return (*args, *((f"y_{i}", (None, s.out_features), s.out_dtype) for i, s in self.results))

    @property
    def results(self) -> tuple[tuple[int, LinearSpec], ...]:
        """The stages whose results are kept."""
        return tuple((i, s) for i, s in enumerate(self.stages) if self.kept[i])


def chains(spec: LinearSpec) -> bool:
    """Whether a linear may be part of a chain."""
    return spec.format != "none" and not spec.activation.exact and not spec.experts
