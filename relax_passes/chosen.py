"""Which kernel a linear of a module got: what passes report, and manifests keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from amx_tvm.errors import ArtifactError
from amx_tvm.schema import Mismatch, conform
from relax_passes.spec import LinearSpec


@dataclass(frozen=True)
class ChosenKernel:
    """A linear, and the kernel that it got for some numbers of rows.

    Parameters
    ----------
    name : str
        The linear's; several that became one are joined by "+".
    spec : LinearSpec
        What the kernel computes, and for how many rows.
    kernel : str
        The schedule rule.
    why : str
        What the rule says of its choice.
    rows : mapping of int to str
        Which part of the kernel runs from how many rows of x on.
    record : str or None
        The tuning record that its knobs are from.
    chain : str
        The function that holds it with the linears around it; "" for one of its own.
    """

    name: str
    spec: LinearSpec
    kernel: str
    why: str = ""
    rows: Mapping[int, str] = field(default_factory=dict)
    record: str | None = None
    chain: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the entry of a manifest."""
        kept = {k: v for k, v in vars(self).items() if v or k != "chain"}
        rows = {str(first): part for first, part in self.rows.items()}
        return {**kept, "spec": self.spec.to_json(), "rows": rows}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ChosenKernel:
        """Read an entry, which may be damaged.

        Raises
        ------
        Mismatch, FormatError
            For missing fields, and values that no kernel has.
        """
        entry = conform(_Entry, data, "linear")
        values = {f.name: entry[f.name] for f in fields(ChosenKernel) if f.name in entry}
        rows = entry.get("rows", {})
        if not all(first.isdecimal() and len(first) < 10 for first in rows):
            raise Mismatch(f"rows are {', '.join(rows)}; expected whole numbers")
        values["rows"] = {int(first): rows[first] for first in sorted(rows, key=int)}
        return ChosenKernel(**{**values, "spec": LinearSpec.from_json(entry["spec"])})


def chosen_kernels(entries: Iterable[Mapping[str, Any]]) -> list[ChosenKernel]:
    """Read what a manifest says of its linears.

    Raises
    ------
    ArtifactError, FormatError
        For an entry that is damaged.
    """
    try:
        return [ChosenKernel.from_json(entry) for entry in entries]
    except Mismatch as problem:
        raise ArtifactError(f"the manifest's linears: {problem}; compile the model again") from None


class _Needed(TypedDict):
    name: str
    spec: dict[str, Any]
    kernel: str


class _Entry(_Needed, total=False):
    why: str
    rows: dict[str, str]
    record: str | None
    chain: str
