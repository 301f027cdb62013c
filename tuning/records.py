"""Tuning records: one JSON line a kernel, one file an exact target.

    {"schema": 3, "target": "llvm/x86-64/znver4", "kernel": {...}, "knobs": {"prefetch": 8192},
     "trace": [instructions, decisions], "rows": [1], "seconds": 1.2e-5, "spread": [q1, q3],
     "default_seconds": 1.3e-5, "ratio": [q1, median, q3], "check": {"error": 2e-7, "limit": 1e-5},
     "versions": {"amx_tvm": ..., "tvm": ...}, "host": {...}, "time": "2026-01-31T12:00:00Z"}

A record is used only where everything about it is known to fit; `refusal` says what does not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

from amx_tvm.errors import AmxError, TuningError
from amx_tvm.schema import Count, conform
from tuning import journal
from tuning.entries import Positive, Quartiles, Spread
from tuning.journal import Damage
from tuning.kernels import KernelId

SCHEMA = 3
SHIPPED = Path(__file__).parent / "records"


@dataclass(frozen=True)
class Record:
    """What tuning found for one kernel.

    Attributes
    ----------
    target : str
        Exact target key.
    kernel : KernelId
        What was tuned.
    knobs : dict
        The winning values.
    trace : list
        MetaSchedule's JSON trace of them (tuning/decisions.py): what is replayed.
    rows : tuple of int
        Numbers of rows of x that were measured; seconds are their sum.
    seconds, default_seconds : float
        Median of a call with the knobs and with the defaults, measured in turn.
    spread : tuple of float
        Quartiles of ``seconds``.
    ratio : tuple of float
        Quartiles and median of seconds / default, repeat by repeat: (q1, median, q3).
    check : dict
        "error", the largest deviation from the NumPy oracle relative to its largest value, and
        the "limit" it was held to.
    versions, host : dict
        What measured it.
    time : str
        When, in UTC.
    """

    target: str
    kernel: KernelId
    knobs: dict[str, Any]
    trace: list[Any]
    rows: tuple[int, ...]
    seconds: float
    default_seconds: float
    spread: tuple[float, float]
    ratio: tuple[float, float, float]
    check: dict[str, float]
    versions: dict[str, str] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    time: str = ""

    @property
    def gpu(self) -> str:
        """What the driver calls the GPU that measured it; "" for CPUs."""
        return str(self.host.get("gpu", ""))

    def to_json(self) -> dict[str, Any]:
        """Return the line's object."""
        return {"schema": SCHEMA, **vars(self), "kernel": self.kernel.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Record:
        """Read a line's object.

        Raises
        ------
        ValueError
            For another schema, and for missing or unknown fields; the message names them.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema {data.get('schema')!r}, this version reads {SCHEMA}")
        given = {name: value for name, value in data.items() if name != "schema"}
        if unknown := set(given) - {f.name for f in fields(Record)}:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        line = conform(_Line, given)
        try:
            kernel = KernelId.from_json(line["kernel"])
        except (ValueError, AmxError) as error:
            raise ValueError(
                f"its kernel is not described as this version does: {error}"
            ) from error
        return Record(**{**line, "kernel": kernel})


class _Optional(TypedDict, total=False):
    versions: dict[str, str]
    host: dict[str, Any]
    time: str


class _Line(_Optional):
    """What a line holds beside its schema's number."""

    target: str
    kernel: dict[str, Any]
    knobs: dict[str, Any]
    trace: list[Any]
    rows: tuple[Count, ...]
    seconds: Positive
    default_seconds: Positive
    spread: Spread
    ratio: Quartiles
    check: dict[str, float]


def refusal(record: Record, target: str, kernel: KernelId | None = None) -> str | None:
    """Return why a record must not be used here, or None.

    Parameters
    ----------
    record : Record
        The record in question.
    target : str
        Exact key of the target that is compiled for.
    kernel : KernelId, optional
        The kernel as this installation builds it; when None only the record itself is judged.
    """
    from tuning.decisions import replay
    from tuning.spaces import unknown_knobs

    if record.target != target:
        return f"made for target {record.target}, this is {target}"
    if kernel is not None:
        if record.kernel.problem != kernel.problem:
            return f"made for kernel {record.kernel.text}, this is {kernel.text}"
        if record.kernel.template != kernel.template:
            return f"made for template {record.kernel.template}, this is {kernel.template}"
        if record.kernel.revision != kernel.revision:
            return (
                f"made for revision {record.kernel.revision} of {kernel.template}, this is "
                f"{kernel.revision}"
            )
    if reason := unknown_knobs(record.knobs, record.kernel.layout):
        return reason
    try:
        decided = replay(record.trace)
    except ValueError as error:
        return str(error)
    if decided != record.knobs:
        return f"its trace decides {decided}, its knobs say {record.knobs}"
    off, limit = record.check.get("error"), record.check.get("limit")
    if off is None or limit is None or not off <= limit:
        return f"its numeric check did not pass (error {off}, limit {limit})"
    return None


def file_name(target: str) -> str:
    """Return the file of a target's records: its key, with what paths cannot hold replaced."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", target) + ".jsonl"


class RecordFile:
    """The records of one target."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.records: list[Record] = []
        self.damage: list[Damage] = []
        if self.path.exists():
            self._load()

    @staticmethod
    def of(directory: str | os.PathLike[str], target: str) -> RecordFile:
        """Open the file of a target in a directory; it need not exist."""
        return RecordFile(Path(directory) / file_name(target))

    def _load(self) -> None:
        entries, self.damage = journal.read(self.path)
        for number, entry in entries:
            try:
                self.records.append(Record.from_json(entry))
            except ValueError as error:
                self.damage.append(Damage(str(self.path), number, f"no record: {error}"))

    def append(self, record: Record) -> None:
        """Add a record, on disk when this returns."""
        journal.append(self.path, record.to_json())
        self.records.append(record)

    def best(self) -> list[Record]:
        """Return the record with the largest gain over the default for each kernel and GPU."""
        found: dict[tuple[KernelId, str], Record] = {}
        for record in self.records:
            kept = found.get((record.kernel, record.gpu))
            if kept is None or record.ratio[1] < kept.ratio[1]:
                found[record.kernel, record.gpu] = record
        return list(found.values())


def merge(paths: Iterable[str | os.PathLike[str]], output: str | os.PathLike[str]) -> RecordFile:
    """Write the records of several files of one target into one, each kernel's best first.

    Raises
    ------
    TuningError
        When a file does not exist, holds no readable record, or is of another target.
    """
    found: list[Record] = []
    for path in paths:
        if not Path(path).exists():
            raise TuningError(f"there is no record file {path}")
        part = RecordFile(path)
        if not part.records:
            raise TuningError(f"{path} holds no readable tuning record")
        found += part.records
    targets = sorted({r.target for r in found})
    if len(targets) > 1:
        raise TuningError(
            f"records of several targets do not belong into one file: {', '.join(targets)}; merge "
            "the files of one target at a time"
        )
    unique = {str(sorted(r.to_json().items())): r for r in found}
    kept = sorted(unique.values(), key=lambda r: (r.kernel.text, r.gpu, r.ratio[1]))
    journal.replace(output, (r.to_json() for r in kept))
    return RecordFile(output)


def prune(path: str | os.PathLike[str], kernels: Mapping[tuple, KernelId] | None = None) -> int:
    """Keep the best record of each kernel and drop unreadable lines; returns how many lines went.

    Parameters
    ----------
    path : path
        A record file.
    kernels : mapping, optional
        ``KernelId.problem`` -> the kernel of this installation; records it refuses are dropped.
    """
    file = RecordFile(path)
    kept = []
    for record in file.best():
        kernel = (kernels or {}).get(record.kernel.problem)
        if kernel is None or refusal(record, record.target, kernel) is None:
            kept.append(record)
    gone = len(file.records) + len(file.damage) - len(kept)
    journal.replace(path, (r.to_json() for r in kept))
    return gone
