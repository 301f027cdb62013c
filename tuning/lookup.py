"""Records for the compiler: the callable LinearSpec -> knobs or None that `compile` takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from amx_tvm.errors import TuningError
from relax_passes.schedules.spec import LinearSpec
from tuning.kernels import identity
from tuning.records import SHIPPED, RecordFile, file_name, refusal


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
        self.refused: list[tuple[Any, str]] = []
        self._by_shape: dict[tuple, list[Any]] = {}
        for record in sorted(self.file.records, key=lambda r: r.ratio[1]):
            self._by_shape.setdefault((record.kernel.n, record.kernel.k), []).append(record)

    def __call__(self, spec: LinearSpec) -> Mapping[str, Any] | None:
        """Return the knobs of the best record that fits, or None."""
        candidates = self._by_shape.get((spec.n, spec.k))
        if not candidates:
            return None
        kernel = identity(spec, self.target.tvm, self.target.layout)
        for record in candidates:
            if record.kernel.problem != kernel.problem:
                continue
            reason = refusal(record, self.target.key, kernel)
            if reason is None:
                return dict(record.knobs)
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
