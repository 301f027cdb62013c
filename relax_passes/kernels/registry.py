"""The ordered list of schedule rules; the first that answers makes the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.target import Target

from amx_tvm.errors import TargetError
from relax_passes.spec import LinearSpec

from .base import RowRange, Rule, TargetInfo
from .chain import ChainSpec
from .cpu.linear.rules import CPU_RULES
from .cuda.linear.rules import CUDA_RULES

_RULES: list[Rule] = [*CPU_RULES, *CUDA_RULES]


@dataclass(frozen=True)
class Kernel:
    """A chosen kernel: its function, the rule's name, the reason in words, and what runs when."""

    func: tvm.tirx.PrimFunc
    rule: str
    why: str
    rows: tuple[RowRange, ...] = ()


def rules() -> tuple[Rule, ...]:
    """List the rules in the order in which they are asked."""
    return tuple(_RULES)


def linear_kernel(
    spec: LinearSpec,
    target: Target | TargetInfo,
    knobs: Mapping[str, Any] | None = None,
    rule: str | None = None,
) -> Kernel:
    """Build the kernel of a linear.

    Parameters
    ----------
    spec : LinearSpec
        What to compute.
    target : tvm.target.Target or TargetInfo
        Where it will run.
    knobs : mapping, optional
        Parameters of the rule's schedule; its defaults otherwise.
    rule : str, optional
        Ask only the rule of this name.

    Raises
    ------
    TargetError
        No rule answers for this target and activation type.
    """
    info = TargetInfo.of(target)
    asked = [r for r in _RULES if rule in (None, r.name)]
    for candidate in asked:
        func = candidate.apply(spec, info, knobs)
        if func is not None:
            runs = candidate.rows(spec, info, knobs)
            return Kernel(func, candidate.name, candidate.why(spec, info), runs)
    raise TargetError(
        f"no kernel for a {spec.format} linear with {spec.activation} activations on target kind "
        f"{info.kind!r} ({info.arch}); rules asked: {', '.join(r.name for r in asked) or 'none'}"
    )


def row_kernels(
    spec: LinearSpec, target: Target | TargetInfo, rule: str, knobs: Mapping[str, Any] | None = None
) -> tuple[RowRange, ...]:
    """List which kernels the function of a linear runs, by rising number of rows of x.

    Parameters
    ----------
    spec, target, knobs
        As for `linear_kernel`.
    rule : str
        Name of the rule that made the function.
    """
    (made_by,) = (r for r in _RULES if r.name == rule)
    return made_by.rows(spec, TargetInfo.of(target), knobs)


def chain_kernel(
    spec: ChainSpec, target: Target | TargetInfo, knobs: Sequence[Mapping[str, Any] | None]
) -> Kernel:
    """Build the kernel of a chain, with the knobs of each linear (None: defaults).

    Raises
    ------
    TargetError
        No rule has chains for this target.
    """
    info = TargetInfo.of(target)
    for candidate in _RULES:
        build = getattr(candidate, "chain", None)
        func = build(spec, info, knobs) if build is not None else None
        if func is not None:
            return Kernel(func, candidate.name, candidate.why(spec.stages[0], info))
    raise TargetError(f"no kernel for chains of linears on target kind {info.kind!r} ({info.arch})")
