"""The tuning records that a bundle was compiled with, written into it.

    tuning/llvm_x86-64_x86-64-v3.jsonl      one line a record, as `amx-tvm tune` writes them

so that the same bundle can be made again: ``export(..., records="BUNDLE/tuning")``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amx_tvm.targets import ResolvedTarget
from tuning.lookup import records_for
from tuning.records import file_name

FOLDER = "tuning"


class UsedRecords:
    """A lookup of records that remembers those it answered with.

    Parameters
    ----------
    given : path, callable, bool or None
        What the user gives as ``records``; see `tuning.lookup.records_for`.
    target : ResolvedTarget
        What is compiled for.

    Attributes
    ----------
    records : callable or False
        What `amx_tvm.compile` takes as ``records``.
    """

    def __init__(self, given: Any, target: ResolvedTarget) -> None:
        self._target = target
        self._lines: set[str] = set()
        lookup = records_for(given, target)

        def remember(spec: Any) -> Any:
            knobs = lookup(spec) if lookup is not None else None
            for record in getattr(knobs, "records", ()):
                self._lines.add(json.dumps(record.to_json(), sort_keys=True))
            return knobs

        self.records = False if lookup is None else remember

    def write(self, directory: Path) -> None:
        """Write the records that were used, if any, into a bundle's folder."""
        if not self._lines:
            return
        folder = directory / FOLDER
        folder.mkdir(exist_ok=True)
        text = "".join(line + "\n" for line in sorted(self._lines))
        (folder / file_name(self._target.key)).write_text(text, encoding="utf-8")
