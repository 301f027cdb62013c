"""A tuning session: budget, order of the tasks, the log of trials, and the records at the end.

Every finished measurement is a line of the log before the next one starts. A session that finds a
log of the same kernels (same target, schedule revision, knobs) continues it: what was measured
counts, and no point is measured a second time.

    DIR/TARGET.trials.jsonl   every trial, failures too
    DIR/TARGET.jsonl          the records: points that beat the default by MIN_GAIN, measured again
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.errors import TuningError
from amx_tvm.schema import Mismatch
from amx_tvm.targets import ResolvedTarget
from amx_tvm.version import versions
from tuning import journal
from tuning.decisions import trace_of
from tuning.entries import line_of, require_points
from tuning.host import host
from tuning.kernels import KernelId, identity
from tuning.measure import Failure, Measured, Worker
from tuning.pool import Job, Pool
from tuning.records import Record, RecordFile, file_name
from tuning.search import Search, point_key, ratios
from tuning.spaces import Space, space_of
from tuning.tasks import Task

MIN_GAIN = 0.02  # a record has to be this much faster than the default, and so in most turns
REPEATS = 5
FINAL_REPEATS = 15
TRIES = 2  # of a default, and of a winner's last measurement, where a worker dies under them
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

    def learn(self, entry: Mapping[str, Any]) -> bool:
        """Take in a line of the log; returns whether its point is the new incumbent."""
        if entry["phase"] == "default":
            self.default_seconds = entry["seconds"]
        elif entry["phase"] == "final":
            self.final = dict(entry)
        elif entry["state"] == "ok":
            ratio = tuple(entry["ratio"])
            return self.search.measured(entry["knobs"], entry["against"], ratio)
        else:
            self.search.failed(entry["knobs"])
            self.failures[entry["state"]] = self.failures.get(entry["state"], 0) + 1
        return False


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
        For what; the workers have to be able to run its kernels.
    directory : path
        Where the log and the records are; one session at a time.
    workers : sequence of Worker
        What measures, each on a device of its own, all at the same time.
    spaces : callable, optional
        (spec, target, rows) -> Space; by default ``tuning.spaces.space_of``.
    tell : callable, optional
        Called with a Progress after every trial.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        target: ResolvedTarget,
        directory: str | os.PathLike[str],
        workers: Sequence[Worker],
        spaces: Callable[[Any, Any, int | None], Space] = space_of,
        tell: Callable[[Progress], None] | None = None,
        repeats: int = REPEATS,
    ):
        self.target, self.pool, self.repeats = target, Pool(workers), repeats
        self.log = Path(directory) / file_name(target.key).replace(".jsonl", ".trials.jsonl")
        self._lock = journal.lock(self.log)
        self.records = RecordFile.of(directory, target.key)
        self.tell = tell or (lambda _progress: None)
        self.trials = 0
        self.states = []
        for number, task in enumerate(tasks):
            space = spaces(task.spec, target.tvm, task.rows)
            kernel = identity(task.spec, target.tvm, target.layout, task.rows)
            self.states.append(TaskState(task, kernel, space, Search(space, number)))
        self.damage = self._resume()

    def close(self) -> None:
        """Let another session continue in this directory."""
        self._lock.close()

    def _resume(self) -> list[journal.Damage]:
        """Read the log: trials of these very kernels count as done."""
        if not self.log.exists():
            return []
        entries, damage = journal.read(self.log)
        states = {json.dumps(s.kernel.to_json(), sort_keys=True): s for s in self.states}
        for number, entry in entries:
            try:
                line = line_of(entry)
                state = states.get(json.dumps(line["kernel"], sort_keys=True))
                if state is not None and line["target"] == self.target.key:
                    require_points(line, state.space)
                    state.learn(line)
            except Mismatch as error:
                damage.append(journal.Damage(str(self.log), number, str(error)))
        return sorted(damage, key=lambda d: d.line)

    def run(self, minutes: float | None = None, trials: int | None = None) -> list[TaskState]:
        """Search until the budget is spent or all points were tried; then write the records.

        Parameters
        ----------
        minutes : float, optional
            Wall-clock budget; the last measurements of the winners come on top.
        trials : int, optional
            Number of new trials.

        Raises
        ------
        TuningError
            When a default cannot be measured, or every device is gone; what was measured is in the
            log and counts the next time.
        """
        start = time.monotonic()
        end = start + 60 * minutes if minutes is not None else None
        handed = 0

        def spent() -> bool:
            late = end is not None and time.monotonic() >= end
            return late or (trials is not None and handed >= trials)

        def report(state: TaskState, event: str) -> None:
            now = time.monotonic()
            left = max(0.0, end - now) if end is not None else None
            if trials is not None and self.trials:
                by_trials = (now - start) / self.trials * (trials - self.trials)
                left = by_trials if left is None else min(left, by_trials)
            self.tell(Progress(state, self.trials, trials, now - start, left, event))

        waiting = [s for s in self.states if s.default_seconds is None]

        def next_default(_worker: Worker) -> Job | None:
            return self._default(waiting.pop(0), report) if waiting and not spent() else None

        visits: dict[Worker, list[Any]] = {}

        def next_trial(worker: Worker) -> Job | None:
            nonlocal handed
            if spent():
                return None
            visit = visits.get(worker)
            if visit is None or visit[1] == 0 or visit[0].search.exhausted:
                needy = self._neediest()
                if needy is None:
                    return None
                visit = visits[worker] = [needy, TRIALS_A_VISIT]
            visit[1] -= 1
            point = visit[0].search.next()
            if point is None:
                return None
            handed += 1
            return self._trial(visit[0], point, report)

        self.pool.drive(next_default)
        self.pool.drive(next_trial)
        winners = [s for s in self.states if s.search.incumbent != s.space.default]

        def next_final(_worker: Worker) -> Job | None:
            while winners:
                state = winners.pop(0)
                final = state.final or {"state": "", "knobs": {}}
                if final["state"] != "ok" or final["knobs"] != state.search.incumbent:
                    return self._final(state)
            return None

        self.pool.drive(next_final)
        for state in self.states:
            self.keep(state)
        return self.states

    @staticmethod
    def _job(
        state: TaskState,
        contenders: list[dict[str, Any]],
        repeats: int,
        handle: Callable[[Any], None],
        tries: int = 1,
    ) -> Job:
        return Job(state.task.spec, state.space.rows, contenders, repeats, handle, tries)

    def _default(self, state: TaskState, report: Callable[[TaskState, str], None]) -> Job:
        """Measure the default by itself: it must work, and its time sets the task's share."""

        def handle(result: Any) -> None:
            if isinstance(result, Failure):
                raise TuningError(
                    f"the default of {state.task.text} cannot be measured "
                    f"({result.kind}: {result.detail}); nothing can be compared with it"
                )
            seconds = float(np.median(result.times[0]))
            self.note(state, "default", state.space.default, seconds=seconds)
            report(state, "default")

        return self._job(state, [dict(state.space.default)], self.repeats, handle, TRIES)

    def _neediest(self) -> TaskState | None:
        """Return the task with the fewest trials for its share of a decode step or a prefill."""
        open_ = [s for s in self.states if s.default_seconds is not None and not s.search.exhausted]
        if not open_:
            return None

        def share(state: TaskState) -> float:
            def cost(s: TaskState) -> float:
                return (s.default_seconds or 0.0) * (s.task.decode or s.task.prefill)

            phase = [s for s in self.states if (s.task.spec.m == 1) == (state.task.spec.m == 1)]
            return cost(state) / max(sum(map(cost, phase)), 1e-12)

        def tried(state: TaskState) -> int:
            return state.search.trials + len(state.search.pending)

        return min(open_, key=lambda s: (tried(s) + 1) / max(share(s), 1e-3))

    def _trial(
        self, state: TaskState, point: dict[str, Any], report: Callable[[TaskState, str], None]
    ) -> Job:
        """Measure a challenger in turns with the incumbent."""
        against = dict(state.search.incumbent)

        def handle(result: Any) -> None:
            self.trials += 1
            if isinstance(result, Failure):
                self.note(state, "trial", point, result.kind, detail=result.detail)
                return report(state, result.kind)
            ratio = ratios(result.times[1], result.times[0])
            seconds = float(np.median(result.times[1]))
            won = self.note(state, "trial", point, against=against, ratio=ratio, seconds=seconds)
            return report(state, "better" if won else "measured")

        return self._job(state, [against, point], self.repeats, handle)

    def _final(self, state: TaskState) -> Job:
        """Measure the winner against the default once more, longer."""
        best = dict(state.search.incumbent)

        def handle(result: Any) -> None:
            if isinstance(result, Failure):
                self.note(state, "final", best, result.kind, detail=result.detail)
            else:
                self.note(state, "final", best, **_summary(result))

        return self._job(state, [dict(state.space.default), best], FINAL_REPEATS, handle, TRIES)

    def keep(self, state: TaskState) -> None:
        """Write the record of a winner that its last measurement confirmed."""
        best, final = state.search.incumbent, state.final
        if final is None or final["state"] != "ok" or final["knobs"] != best:
            return
        if best == state.space.default:
            return
        q1, median, q3 = final["ratio"]
        if median > 1 - MIN_GAIN or q3 >= 1:
            return
        for record in self.records.records:
            same = record.kernel == state.kernel and record.gpu == final["host"].get("gpu", "")
            if same and point_key(record.knobs) == point_key(best):
                state.record = record
                return
        state.record = Record(
            target=self.target.key,
            kernel=state.kernel,
            knobs=best,
            trace=trace_of(state.space, best),
            rows=state.space.rows,
            seconds=final["seconds"],
            default_seconds=final["default_seconds"],
            spread=tuple(final["spread"]),
            ratio=(q1, median, q3),
            check=final["check"],
            versions=versions(),
            host=final["host"],
            time=final["time"],
        )
        self.records.append(state.record)

    def note(
        self,
        state: TaskState,
        phase: str,
        knobs: Mapping[str, Any],
        outcome: str = "ok",
        **more: Any,
    ) -> bool:
        """Write a line of the log and let the task's state learn from it.

        Parameters
        ----------
        state : TaskState
            Whose.
        phase : str
            "default" (with seconds), "trial" (with against, ratio and seconds) or "final" (with
            what a record says).
        knobs : mapping
            The point.
        outcome : str
            "ok", or a ``Failure``'s kind, with its detail.

        Returns
        -------
        bool
            Whether the point is the new incumbent.
        """
        entry = {
            "phase": phase,
            "target": self.target.key,
            "kernel": state.kernel.to_json(),
            "knobs": dict(knobs),
            "state": outcome,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **more,
        }
        journal.append(self.log, entry)
        return state.learn(entry)


def _summary(result: Measured) -> dict[str, Any]:
    """Return what a record says of a final measurement of [default, winner]."""
    q1, median, q3 = (float(v) for v in np.quantile(result.times[1], [0.25, 0.5, 0.75]))
    return {
        "seconds": median,
        "spread": (q1, q3),
        "default_seconds": float(np.median(result.times[0])),
        "ratio": ratios(result.times[1], result.times[0]),
        "check": dict(zip(("error", "limit"), result.errors[1], strict=True)),
        "host": result.host or host(),
    }
