"""Packages: candidates for a GPU, built on a machine without one, to be measured where it is.

    package/
      package.json    tasks: kernel, specification, rows, and of each candidate knobs and library
      TASK-NUMBER.so  machine code (cubins); the first of each task is the default
      results.json    written by package_run.py on the machine with the GPU

A package holds the next proposals of the search for every task, so results can be brought back and
a second package built from what the first one taught.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from amx_tvm.artifact.publication import Publication
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import TuningError
from amx_tvm.targets import resolve
from tuning.package_run import PACKAGE
from tuning.session import Session, TaskState
from tuning.tasks import Task, tasks_of
from tuning.worker import compiled

SCHEMA = 2


def create(
    model: str | os.PathLike[str] | Mapping[str, Any] | Any,
    target: str,
    output: str | os.PathLike[str],
    quantization: str | QuantizationConfig = "amxfp4",
    *,
    candidates: int = 16,
    records: str | os.PathLike[str] = "tuning-records",
    rows: Iterable[int] | None = None,
    jobs: int = 1,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Build a package.

    Parameters
    ----------
    model, quantization :
        As for ``tuning.tune``.
    target : str
        A CUDA target, such as "cuda:sm_90a"; no GPU is needed here.
    output : path
        Directory to make.
    candidates : int
        Points for each task, besides the default.
    records : path
        Directory of the log; points that it has are not built again.
    rows : iterable of int, optional
        Only the kernels for so many rows.
    jobs : int
        Processes that build.
    tell : callable, optional
        Called with a line for each candidate.

    Raises
    ------
    TuningError
        When the target is no GPU, the directory is in use, or a default does not build.
    """
    resolved = resolve(target)
    if resolved.device != "cuda":
        raise TuningError(f"packages are for GPUs; {resolved.key} is measured by `amx-tvm tune`")
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise TuningError(f"{output} is not empty; give a new directory")
    tasks = tasks_of(model, resolved, quantization)
    if rows is not None:
        tasks = [t for t in tasks if t.rows in set(rows)]
    session = Session(tasks, resolved, records, [])
    try:
        entries = [
            {
                **state.task.to_json(),
                "kernel": state.kernel.to_json(),
                "candidates": [
                    {"knobs": point, "library": f"{number:02}-{i:03}.so", "failure": None}
                    for i, point in enumerate(_points(state, candidates))
                ],
            }
            for number, state in enumerate(session.states)
        ]
    finally:
        session.close()
    with Publication(output) as new:
        new.path.mkdir()
        failures = _build(target, entries, new.path, jobs, tell)
        for entry in entries:
            for candidate in entry["candidates"]:
                candidate["failure"] = failures.get(candidate["library"])
            if default := entry["candidates"][0]["failure"]:
                text = Task.from_json(entry).text
                raise TuningError(f"the default of {text} does not build: {default}")
        content = {"schema": SCHEMA, "target": resolved.key, "tasks": entries}
        (new.path / PACKAGE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        new.publish()
    return output


def _points(state: TaskState, count: int) -> list[dict[str, Any]]:
    """Return the default and the next proposals of a task's search."""
    points = [dict(state.space.default)]
    best = state.search.incumbent
    if best != state.space.default:
        points.append(dict(best))
    while len(points) <= count:
        point = state.search.next()
        if point is None:
            break
        points.append(point)
    return points


def _build(
    target: str,
    entries: list[dict[str, Any]],
    output: Path,
    jobs: int,
    tell: Callable[[str], None] | None,
) -> dict[str, str]:
    """Build libraries in processes of their own; returns the failures by file name."""
    work = [(target, e, c, output) for e in entries for c in e["candidates"]]
    failures = {}
    with get_context("spawn").Pool(jobs) as pool:
        for number, (name, failure) in enumerate(pool.imap_unordered(_build_one, work), 1):
            if failure:
                failures[name] = failure
            if tell is not None:
                tell(f"{number} of {len(work)}: {name} {failure or 'built'}")
    return failures


def _build_one(work: tuple[str, dict[str, Any], dict[str, Any], Path]) -> tuple[str, str]:
    target, entry, candidate, output = work
    task, name = Task.from_json(entry), candidate["library"]
    try:
        module = compiled(task.spec, resolve(target).tvm, candidate["knobs"], task.rows)
        module.export_library(str(output / name))
    except Exception as error:  # one candidate that the compiler refuses costs one candidate
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return name, " ".join(lines)[-300:]
    return name, ""
