"""Records for the compiler: the callable LinearSpec -> knobs or None that `compile` takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from amx_tvm.errors import TuningError
from amx_tvm.targets.cuda.gpus import model
from relax_passes.spec import LinearSpec
from tuning.kernels import identity
from tuning.records import SHIPPED, Record, RecordFile, file_name, refusal


class Knobs(dict):
    """A schedule's knobs that know which records they come from.

    Parameters
    ----------
    knobs : mapping
        Names and values.
    records : list of Record
        Where they come from.
    gpu : str
        The GPU that is compiled for, where it is one.

    Attributes
    ----------
    records : list of Record
        The records themselves, for bundles.
    name : str
        The records in words, for manifests: the revision of each kernel, when it was measured and
        its time over the default's.
    """

    def __init__(self, knobs: Mapping[str, Any], records: list[Record], gpu: str = ""):
        super().__init__(knobs)
        self.records = records
        self.name = "; ".join(
            f"{r.kernel.runs} {r.kernel.revision}: "
            f"{', '.join(f'{k}={v}' for k, v in r.knobs.items())} "
            f"({r.ratio[1]:.3f} of the default, {r.time[:10] or 'undated'}{_where(r, gpu)})"
            for r in records
        )


def _where(record: Record, gpu: str) -> str:
    """Say on which GPU a record was made, and that it is only the nearest one where it is."""
    made = record.gpu
    if not made:
        return ""
    return f", {made}" if gpu in ("", made) else f", {made}, the nearest with records to {gpu}"


class Lookup:
    """The records of one file, for one target.

    Attributes
    ----------
    refused : list of (Record, str)
        Records of kernels that were asked for and why they were not used.
    """

    def __init__(self, path: str | os.PathLike[str], target: Any):
        self.target = target
        self.file = RecordFile(path)
        self.refused: list[tuple[Record, str]] = []
        self._by_spec: dict[LinearSpec, list[Record]] = {}
        meant = model(target.gpu, str(target.features[0])) if target.device == "cuda" else None

        def order(record: Record) -> tuple[float, float]:
            """The GPU that is meant first, then the nearest, then the largest gain."""
            if meant is None:
                return 0.0, record.ratio[1]
            return meant.distance(model(record.gpu, meant.arch)), record.ratio[1]

        for record in sorted(self.file.records, key=order):
            self._by_spec.setdefault(record.kernel.spec, []).append(record)

    def __call__(self, spec: LinearSpec) -> Knobs | None:
        """Return the knobs of the best record that fits, or None.

        For CUDA: of the best record of each bucket of rows that the function has.
        """
        if self.target.device == "cuda":
            return self._function(spec)
        record = self._best(spec, None)
        return Knobs(record.knobs, [record]) if record is not None else None

    def _function(self, spec: LinearSpec) -> Knobs | None:
        """Put a CUDA function together."""
        from tuning import cuda_buckets

        general = cuda_buckets.general(spec)
        if general not in self._by_spec:
            return None
        ends = [b.rows for b in cuda_buckets.buckets_of(spec, self.target.tvm) if b.rows]
        best = {rows: self._best(general, rows) for rows in ends}
        found = {rows: record for rows, record in best.items() if record is not None}
        points = {r: record.knobs for r, record in found.items()}
        knobs = cuda_buckets.function(spec, self.target.tvm, points)
        used = [found[e["rows"]] for e in knobs["buckets"] if e["rows"] in found]
        return Knobs(knobs, used, self.target.gpu) if used else None

    def _best(self, spec: LinearSpec, rows: int | None) -> Record | None:
        made = [r for r in self._by_spec.get(spec, ()) if r.kernel.rows == rows]
        if not made:
            return None
        kernel = identity(spec, self.target.tvm, self.target.layout, rows)
        for record in made:
            reason = refusal(record, self.target.key, kernel)
            if reason is None:
                return record
            self.refused.append((record, reason))
        return None


def records_for(given: Any, target: Any) -> Callable[[LinearSpec], Mapping[str, Any] | None] | None:
    """Turn what a user gives as ``records`` into a lookup.

    Parameters
    ----------
    given : None, bool, path or callable
        None and True take the records that ship for exactly this target; False takes none; a path
        is a record file or a directory of them; a callable is used as it is.
    target : amx_tvm.targets.ResolvedTarget
        What is compiled for.

    Raises
    ------
    TuningError
        For a path that does not exist, and for a file of another target.
    """
    if given is False:
        return None
    if given is None or given is True:
        path = SHIPPED / file_name(target.key)
        return Lookup(path, target) if path.exists() else None
    if callable(given):
        return given
    path = Path(given)
    if path.is_dir():
        path = path / file_name(target.key)
    if not path.exists():
        raise TuningError(f"there are no tuning records for {target.key} at {given}")
    lookup = Lookup(path, target)
    others = sorted({r.target for r in lookup.file.records if r.target != target.key})
    if others:
        raise TuningError(
            f"{path} holds records made for {', '.join(others)}, and this compiles for "
            f"{target.key}; records are used only on the very target they were made on"
        )
    return lookup
