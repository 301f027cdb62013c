"""Bring a package's results home: trials into the log, winners into the records."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amx_tvm.errors import TuningError
from amx_tvm.targets import ResolvedTarget, resolve
from tuning.package import SCHEMA
from tuning.package_run import PACKAGE, RESULTS
from tuning.search import point_key
from tuning.session import Session, TaskState
from tuning.tasks import Task


@dataclass(frozen=True)
class Collected:
    """What a package brought home.

    Attributes
    ----------
    states : list of TaskState
        Every task that is still what it was when the package was built.
    refused : list of str
        The others, each with the reason.
    path : Path
        The record file.
    """

    states: list[TaskState]
    refused: list[str]
    path: Path


def collect(
    folder: str | os.PathLike[str], records: str | os.PathLike[str] = "tuning-records"
) -> Collected:
    """Read what ``package_run`` measured.

    Parameters
    ----------
    folder : path
        A package with its results.
    records : path
        Directory of the log and the records; trials that the log has are not added again.

    Raises
    ------
    TuningError
        When results are missing, a default failed on the GPU, or the schedule of every task has
        changed since the package was built.
    """
    folder = Path(folder)
    content = _read(folder / PACKAGE, "`amx-tvm tune package` makes one")
    results = _read(folder / RESULTS, "`python -m tuning.package_run` writes it")
    if content.get("schema") != SCHEMA:
        raise TuningError(f"{folder} has schema {content.get('schema')!r}, expected {SCHEMA}")
    target = _target(content["target"])
    entries = content["tasks"]
    session = Session([Task.from_json(e) for e in entries], target, records, [])
    taken, refused = [], []
    try:
        for number, (state, entry) in enumerate(zip(session.states, entries, strict=True)):
            if state.kernel.to_json() != entry["kernel"]:
                refused.append(
                    f"the schedule of {state.task.text} has changed since {folder} was built "
                    f"(revision {entry['kernel']['revision']}, now {state.kernel.revision})"
                )
                continue
            taken.append(state)
            found = results["tasks"].get(str(number))
            if found and found["results"]:
                _take(session, state, found, {"gpu": results["gpu"]})
    finally:
        session.close()
    if refused and not taken:
        raise TuningError(f"{refused[0]}, like that of every task of it; build a new package")
    return Collected(taken, refused, session.records.path)


def _read(path: Path, hint: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TuningError(f"{path} cannot be read ({error}); {hint}") from error


def _target(key: str) -> ResolvedTarget:
    kind, _, arch = key.partition("/")
    return resolve(f"{kind}:{arch}")


def _take(session: Session, state: TaskState, found: dict[str, Any], host: dict[str, Any]) -> None:
    """Add one task's trials and, where the last measurement confirmed it, its record."""
    default, *trials = found["results"]
    if default["state"] != "ok":
        raise TuningError(
            f"the default of {state.task.text} failed on the GPU: {default['state']}: "
            f"{default.get('detail', '')}"
        )
    if state.default_seconds is None:
        session.note(state, "default", state.space.default, seconds=default["seconds"])
    for trial in trials:
        if point_key(trial["knobs"]) in state.search.scores:
            continue
        more = {key: trial[key] for key in ("seconds", "ratio", "detail") if key in trial}
        against = dict(state.space.default)
        session.note(state, "trial", trial["knobs"], trial["state"], against=against, **more)
    final = found["final"]
    if final is None:
        return
    best = found["results"][final["candidate"]]
    state.search.incumbent = dict(best["knobs"])
    check = {"error": best["error"], "limit": best["limit"]}
    keys = ("seconds", "spread", "default_seconds", "ratio")
    measured = {key: final[key] for key in keys}
    session.note(state, "final", best["knobs"], check=check, host=host, **measured)
    session.keep(state)
