"""The lines of a session's log: what each must hold before a search learns from it.

A log may be damaged, or edited; a line that does not hold what it should is named and skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from amx_tvm.schema import Mismatch, OneOf, Range, conform
from tuning.spaces import Space


@dataclass(frozen=True)
class Items:
    """A list of so many items."""

    count: int

    def __call__(self, value: Any) -> bool:
        """Whether a list is as long as that."""
        return len(value) == self.count

    def __str__(self) -> str:
        return f"and {self.count} of them"


Positive = Annotated[float, Range(1e-12, 1e12)]  # seconds and their ratios
Quartiles = Annotated[tuple[Positive, ...], Items(3)]  # q1, median, q3
Spread = Annotated[tuple[Positive, ...], Items(2)]  # q1, q3


class Line(TypedDict):
    """What every line has."""

    phase: Annotated[str, OneOf(("default", "trial", "final"))]
    target: str
    kernel: dict[str, Any]
    knobs: dict[str, Any]
    state: str


class _Default(Line):
    seconds: Positive


class _Trial(Line):
    against: dict[str, Any]
    ratio: Quartiles


class _Final(Line):
    seconds: Positive
    spread: Spread
    default_seconds: Positive
    ratio: Quartiles
    check: dict[str, float]
    host: dict[str, Any]
    time: str


_MEASURED = {"default": _Default, "trial": _Trial, "final": _Final}


def line_of(entry: Mapping[str, Any]) -> Line:
    """Return a line of a log as its schema has it.

    Raises
    ------
    Mismatch
        With the field that is not as it should be.
    """
    line: Line = conform(Line, entry)
    return conform(_MEASURED[line["phase"]], entry) if line["state"] == "ok" else line


def require_points(line: Mapping[str, Any], space: Space) -> None:
    """Refuse a line whose knobs are no points of its kernel's space.

    Raises
    ------
    Mismatch
        With the knobs.
    """
    for name in ("knobs", "against"):
        if name in line and line[name] not in space:
            raise Mismatch(f"{name} is {line[name]}; expected a point of {dict(space.knobs)}")
