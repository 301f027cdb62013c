"""A tuning session: budget, order of the tasks, the log of trials, and the records at the end.

Every finished measurement is a line of the log before the next one starts. A session that finds a
log of the same kernels (same target, schedule revision, knobs) continues it: what was measured
counts, and no point is measured a second time.

    DIR/TARGET.trials.jsonl   every trial, failures too
    DIR/TARGET.jsonl          the records: points that beat the default by MIN_GAIN, measured again
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.errors import TuningError
from amx_tvm.targets import ResolvedTarget
from amx_tvm.version import versions
from tuning import journal
from tuning.kernels import KernelId, identity
from tuning.measure import Failure, Measured, Worker
from tuning.records import Record, RecordFile, file_name
from tuning.search import Search, point_key, ratios
from tuning.spaces import Space, space_of
from tuning.tasks import Task

MIN_GAIN = 0.02  # a record has to be this much faster than the default, and so in most turns
REPEATS = 5
FINAL_REPEATS = 15
TRIALS_A_VISIT = 4  # a task's operands stay in the worker for so many trials


@dataclass
class TaskState:
    """A task with its search and what its log says."""

    task: Task
    kernel: KernelId
    space: Space
    search: Search
    default_seconds: float | None = None
    failures: dict[str, int] = field(default_factory=dict)
    final: dict[str, Any] | None = None
    record: Record | None = None

    @property
    def exhausted(self) -> bool:
        """Whether every point was tried."""
        return self.search.next() is None


@dataclass(frozen=True)
class Progress:
    """What a display needs after every trial."""

    state: TaskState
    trials: int
    budget: int | None
    elapsed: float
    remaining: float | None
    event: str


class Session:
    """Tune tasks within a budget.

    Parameters
    ----------
    tasks : sequence of Task
        What to tune.
    target : ResolvedTarget
        For what; it has to be this machine, because kernels run here.
    directory : path
        Where the log and the records are.
    worker : Worker
        What measures.
    spaces : callable, optional
        (spec, target) -> Space; by default ``tuning.spaces.space_of``.
    tell : callable, optional
        Called with a Progress after every trial.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        target: ResolvedTarget,
        directory: str | os.PathLike[str],
        worker: Worker,
        spaces: Callable[[Any, Any], Space] = space_of,
        tell: Callable[[Progress], None] | None = None,
        repeats: int = REPEATS,
    ):
        self.target, self.worker, self.repeats = target, worker, repeats
        self.records = RecordFile.of(directory, target.key)
        self.log = Path(directory) / file_name(target.key).replace(".jsonl", ".trials.jsonl")
        self.tell = tell or (lambda _progress: None)
        self.trials = 0
        self.states = []
        for number, task in enumerate(tasks):
            space = spaces(task.spec, target.tvm)
            kernel = identity(task.spec, target.tvm, target.layout)
            self.states.append(TaskState(task, kernel, space, Search(space, number)))
        self.damage = self._resume()

    def _resume(self) -> list[journal.Damage]:
        """Read the log: trials of these very kernels count as done."""
        if not self.log.exists():
            return []
        entries, damage = journal.read(self.log)
        states = {s.kernel: s for s in self.states}
        for _, entry in entries:
            state = states.get(KernelId(**entry["kernel"]))
            if state is None or entry["target"] != self.target.key:
                continue
            if entry["phase"] == "default":
                state.default_seconds = entry["seconds"]
            elif entry["phase"] == "final":
                state.final = entry
            elif entry["state"] != "ok":
                state.search.failed(entry["knobs"])
                state.failures[entry["state"]] = state.failures.get(entry["state"], 0) + 1
            else:
                state.search.measured(entry["knobs"], entry["against"], tuple(entry["ratio"]))
        return damage

    def run(self, minutes: float | None = None, trials: int | None = None) -> list[TaskState]:
        """Search until the budget is spent or all points were tried; then write the records.

        Parameters
        ----------
        minutes : float, optional
            Wall-clock budget; the last measurements of the winners come on top.
        trials : int, optional
            Number of new trials.
        """
        start = time.monotonic()
        end = start + 60 * minutes if minutes is not None else None

        def spent() -> bool:
            late = end is not None and time.monotonic() >= end
            return late or (trials is not None and self.trials >= trials)

        def report(state: TaskState, event: str) -> None:
            now = time.monotonic()
            left = max(0.0, end - now) if end is not None else None
            if trials is not None and self.trials:
                by_trials = (now - start) / self.trials * (trials - self.trials)
                left = by_trials if left is None else min(left, by_trials)
            self.tell(Progress(state, self.trials, trials, now - start, left, event))

        for state in self.states:
            if spent():
                break
            if state.default_seconds is None:
                report(state, self._default(state))
        while not spent():
            needy = self._neediest()
            if needy is None:
                break
            for _ in range(TRIALS_A_VISIT):
                point = needy.search.next()
                if point is None or spent():
                    break
                report(needy, self._trial(needy, point))
        for state in self.states:
            self._finish(state)
        return self.states

    def _default(self, state: TaskState) -> str:
        """Measure the default by itself: it must work, and its time sets the task's share."""
        result = self.worker.measure(
            state.task.spec, state.space.rows, [dict(state.space.default)], self.repeats
        )
        if isinstance(result, Failure):
            raise TuningError(
                f"the default of {state.task.text} cannot be measured on this machine "
                f"({result.kind}: {result.detail}); nothing can be compared with it"
            )
        state.default_seconds = float(np.median(result.times[0]))
        self._note(state, "default", state.space.default, "ok", seconds=state.default_seconds)
        return "default"

    def _neediest(self) -> TaskState | None:
        """Return the task with the fewest trials for its share of a decode step or a prefill."""
        open_ = [s for s in self.states if s.default_seconds is not None and not s.exhausted]
        if not open_:
            return None

        def share(state: TaskState) -> float:
            def cost(s: TaskState) -> float:
                return (s.default_seconds or 0.0) * (s.task.decode or s.task.prefill)

            phase = [s for s in self.states if (s.task.spec.m == 1) == (state.task.spec.m == 1)]
            return cost(state) / max(sum(map(cost, phase)), 1e-12)

        return min(open_, key=lambda s: (s.search.trials + 1) / max(share(s), 1e-3))

    def _trial(self, state: TaskState, point: dict[str, Any]) -> str:
        """Measure a challenger in turns with the incumbent."""
        against = dict(state.search.incumbent)
        result = self.worker.measure(
            state.task.spec, state.space.rows, [against, point], self.repeats
        )
        self.trials += 1
        if isinstance(result, Failure):
            self._note(state, "trial", point, result.kind, detail=result.detail)
            state.search.failed(point)
            state.failures[result.kind] = state.failures.get(result.kind, 0) + 1
            return result.kind
        ratio = ratios(result.times[1], result.times[0])
        seconds = float(np.median(result.times[1]))
        self._note(state, "trial", point, "ok", against=against, ratio=ratio, seconds=seconds)
        return "better" if state.search.measured(point, against, ratio) else "measured"

    def _finish(self, state: TaskState) -> None:
        """Measure the winner against the default once more, longer, and write its record."""
        best = state.search.incumbent
        if best == state.space.default:
            return
        if state.final is None or state.final["knobs"] != best:
            spec, rows = state.task.spec, state.space.rows
            result = self.worker.measure(
                spec, rows, [dict(state.space.default), best], FINAL_REPEATS
            )
            if isinstance(result, Failure):
                self._note(state, "final", best, result.kind, detail=result.detail)
                return
            state.final = self._note(state, "final", best, "ok", **_summary(result))
        final = state.final
        q1, median, q3 = final.get("ratio", (1.0, 1.0, 1.0))
        if median > 1 - MIN_GAIN or q3 >= 1:
            return
        changed = {k: v for k, v in best.items() if v != state.space.default[k]}
        known = [r for r in self.records.records if r.kernel == state.kernel]
        for record in known:
            if point_key(record.knobs) == point_key(changed):
                state.record = record
                return
        state.record = Record(
            target=self.target.key,
            kernel=state.kernel,
            knobs=changed,
            rows=state.space.rows,
            seconds=final["seconds"],
            default_seconds=final["default_seconds"],
            spread=tuple(final["spread"]),
            ratio=(q1, median, q3),
            check=final["check"],
            versions=versions(),
            host=host(),
            time=final["time"],
        )
        self.records.append(state.record)

    def _note(
        self, state: TaskState, phase: str, knobs: Any, outcome: str, **more: Any
    ) -> dict[str, Any]:
        """Write a line of the log."""
        entry = {
            "phase": phase,
            "target": self.target.key,
            "kernel": asdict(state.kernel),
            "knobs": dict(knobs),
            "state": outcome,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **more,
        }
        journal.append(self.log, entry)
        return entry


def _summary(result: Measured) -> dict[str, Any]:
    """Return what a record says of a final measurement of [default, winner]."""
    q1, median, q3 = (float(v) for v in np.quantile(result.times[1], [0.25, 0.5, 0.75]))
    return {
        "seconds": median,
        "spread": (q1, q3),
        "default_seconds": float(np.median(result.times[0])),
        "ratio": ratios(result.times[1], result.times[0]),
        "check": dict(zip(("error", "limit"), result.errors[1], strict=True)),
    }


def host() -> dict[str, Any]:
    """Return what is worth knowing of the machine that measured; no names of machines or users."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system()}
