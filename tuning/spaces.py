"""Knob spaces: the values each knob of a schedule may take for one kernel.

A space lists only knobs that change the code of this kernel: what a decode step (M = 1) never runs
has no place in its space. The default is always a member, and knobs that a candidate does not name
keep their defaults, so a record stays short and readable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from math import prod
from typing import Any

from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu.linear import panel_bytes, panel_terms, panel_words
from relax_passes.kernels.cpu.linear.knobs import CpuKnobs
from relax_passes.kernels.cpu.linear.rules import isa_of
from relax_passes.spec import LinearSpec

PREFETCH = (0, 512, 1024, 2048, 4096, 8192, 16384)
ROWS = (0, 1, 2, 4)
PANEL_TILES = (1, 2, 4)
PANEL_BLOCKS = (4, 6, 8, 12)
PANEL_ROWS = (8, 16)
# A kernel for every M reads its weights once for all rows: a few distances will do.
PREFETCH_MANY = (0, 2048, 4096, 8192)
# Rows of x that a kernel for every M is measured with: eight sequences and a chunk of a prompt.
MANY_ROWS = (8, 128)


@dataclass(frozen=True)
class Space:
    """The points of a kernel: every combination of its knobs' values.

    Attributes
    ----------
    knobs : dict of str to tuple
        Values of each knob, in rising order.
    default : dict
        The point that the schedule takes without a record.
    rows : tuple of int
        Numbers of rows of x that a point is judged by.
    """

    knobs: Mapping[str, tuple[Any, ...]]
    default: Mapping[str, Any]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, values in self.knobs.items():
            if self.default.get(name) not in values:
                raise ValueError(f"the default of {name} is no member of its values {values}")

    def __contains__(self, point: Mapping[str, Any]) -> bool:
        """Whether a point has this space's knobs, each with one of its values."""

        def has(name: str) -> bool:
            value = point[name]
            return any(type(v) is type(value) and v == value for v in self.knobs[name])

        return point.keys() == self.knobs.keys() and all(map(has, point))

    @property
    def size(self) -> int:
        """Number of points."""
        return prod(len(v) for v in self.knobs.values())

    def points(self) -> Iterator[dict[str, Any]]:
        """Iterate over all points, the default first."""
        yield dict(self.default)
        for values in product(*self.knobs.values()):
            point = dict(zip(self.knobs, values, strict=True))
            if point != self.default:
                yield point

    def neighbours(self, point: Mapping[str, Any]) -> list[dict[str, Any]]:
        """List the points that differ from one in a single knob, by one place."""
        found = []
        for name, values in self.knobs.items():
            place = values.index(point[name])
            for other in (place - 1, place + 1):
                if 0 <= other < len(values):
                    found.append({**point, name: values[other]})
        return found


def space_of(spec: LinearSpec, target: Any, rows: int | None = None) -> Space:
    """Return the space of a kernel.

    Parameters
    ----------
    spec : LinearSpec
        The kernel.
    target : tvm.target.Target or TargetInfo
        What it is built for.
    rows : int, optional
        The bucket of a CUDA function.
    """
    info = TargetInfo.of(target)
    if rows is not None:
        from tuning import cuda_buckets

        values, point = cuda_buckets.space(spec, target, rows)
        return Space(values, point, (rows,))
    quantized = spec.format != "none"
    panels = quantized and spec.activation.integer and info.has("avx512vbmi")
    isa = isa_of(info)
    kinds = (panel_words, panel_terms, panel_bytes)
    others = any(kind.from_rows(spec, isa, CpuKnobs()) is not None for kind in kinds)
    knobs: dict[str, tuple[Any, ...]] = {}
    if quantized:
        knobs["prefetch"] = PREFETCH if spec.m is not None else PREFETCH_MANY
    if spec.m is None:
        knobs["rows"] = ROWS
        if panels or others:
            knobs["panel_rows"] = PANEL_ROWS
            even = spec.silu_mul  # a gate tile and its up tile belong to one panel
            knobs["panel_tiles"] = tuple(t for t in PANEL_TILES if not even or t % 2 == 0)
        if panels:
            knobs["panel_block"] = PANEL_BLOCKS
    defaults = CpuKnobs.default(spec, isa)
    default = {name: getattr(defaults, name) for name in knobs}
    knobs = {n: tuple(sorted({*v, default[n]})) for n, v in knobs.items()}
    return Space(knobs, default, (spec.m,) if spec.m is not None else MANY_ROWS)


def unknown_knobs(knobs: Mapping[str, Any], layout: str) -> str | None:
    """Say which knob of a record the schedules of its layout do not have, or hold a wrong type."""
    if layout == "cuda-fragment":
        return _cuda_knobs(knobs)
    known = {f.name: type(getattr(CpuKnobs(), f.name)) for f in fields(CpuKnobs)}
    for name, value in knobs.items():
        if name not in known:
            return f"unknown knob {name!r}; the schedule has {', '.join(known)}"
        if type(value) is not known[name] or value < 0:
            return f"knob {name} is {value!r}, which is no {known[name].__name__} of 0 or more"
    return None


def _cuda_knobs(knobs: Mapping[str, Any]) -> str | None:
    from tuning.cuda_buckets import GEMV, TILE

    # One that a record lacks came later and has its default, or the revision would be another.
    kinds = [values for values in (GEMV, TILE) if knobs and set(knobs) <= set(values)]
    if not kinds:
        return f"unknown knobs {sorted(knobs)}; the schedules have {sorted(GEMV)} or {sorted(TILE)}"
    for name, value in knobs.items():
        if type(value) is not int or value < 0:
            return f"knob {name} is {value!r}, which is no integer of 0 or more"
    return None
