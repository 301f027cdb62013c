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
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import TuningError
from amx_tvm.targets import resolve
from relax_passes.spec import LinearSpec
from tuning.package_run import PACKAGE
from tuning.session import Session, TaskState
from tuning.tasks import tasks_of
from tuning.worker import compiled

SCHEMA = 1


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
    output.mkdir(parents=True, exist_ok=True)
    tasks = tasks_of(model, resolved, quantization)
    if rows is not None:
        tasks = [t for t in tasks if t.rows in set(rows)]
    session = Session(tasks, resolved, records, [])
    try:
        wanted = [_points(state, candidates) for state in session.states]
    finally:
        session.close()
    work = [
        Work(
            target, state.task.spec.to_json(), state.task.rows, output / _library(number, i), point
        )
        for number, (state, points) in enumerate(zip(session.states, wanted, strict=True))
        for i, point in enumerate(points)
    ]
    built = dict(_built(work, jobs, tell))
    entries = []
    for number, (state, points) in enumerate(zip(session.states, wanted, strict=True)):
        found = []
        for i, point in enumerate(points):
            name = _library(number, i)
            found.append({"knobs": point, "library": name, "failure": built[name]})
        if found[0]["failure"]:
            raise TuningError(
                f"the default of {state.task.text} does not build: {found[0]['failure']}"
            )
        entries.append(_entry(state, found))
    content = {"schema": SCHEMA, "target": resolved.key, "tasks": entries}
    (output / PACKAGE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return output


@dataclass(frozen=True)
class Work:
    """One candidate to build in another process, in types that travel."""

    target: str
    spec: dict[str, Any]
    rows: int | None
    path: Path
    point: dict[str, Any]


def _library(task: int, candidate: int) -> str:
    return f"{task:02}-{candidate:03}.so"


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


def _entry(state: TaskState, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "kernel": asdict(state.kernel),
        "spec": state.task.spec.to_json(),
        "name": state.task.name,
        "decode": state.task.decode,
        "prefill": state.task.prefill,
        "rows": state.task.rows,
        "candidates": found,
    }


def _built(
    work: list[Work],
    jobs: int,
    tell: Callable[[str], None] | None,
) -> Iterable[tuple[str, str | None]]:
    """Build libraries in processes of their own; yields (file name, failure or None)."""
    with get_context("spawn").Pool(jobs) as pool:
        for number, (name, failure) in enumerate(pool.imap_unordered(_build_one, work), 1):
            if tell is not None:
                tell(f"{number} of {len(work)}: {name} {failure or 'built'}")
            yield name, failure


def _build_one(work: Work) -> tuple[str, str | None]:
    try:
        target, spec = resolve(work.target), LinearSpec.from_json(work.spec)
        compiled(spec, target.tvm, work.point, work.rows).export_library(str(work.path))
    except Exception as error:  # one candidate that the compiler refuses costs one candidate
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return work.path.name, " ".join(lines)[-300:]
    return work.path.name, None
