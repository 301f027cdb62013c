"""The search: MetaSchedule's evolutionary search over a space's decisions, one task's state.

MetaSchedule proposes (a population of traces is mutated and ranked by the cost model, a share is
random), this module says what a measurement means. TVM's own measuring loop is not used: it knows
absolute seconds only and counts every failure as 1e10 of them. Here

- a challenger is measured in turns with the incumbent and wins only if three quarters of the turns
  agree; scores are log ratios to the default, chained through the incumbents that were measured
  beside each challenger, so a machine that slows down between two trials changes none of them;
- the points around the default come first, since it is good; then evolution proposes;
- what a log says was measured counts as measured, and no point is proposed twice;
- when a small space has nothing left that evolution finds, the untried points come in the order in
  which the model ranks them, so that a session can exhaust a space.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from tuning.cost_model import KnobModel, meta_schedule_model
from tuning.decisions import carrier, knobs_of, sampler
from tuning.spaces import Space

MIN_WIN = 0.005  # of the time: smaller wins are kept out of the chain of incumbents
BATCH = 4  # proposals of one generation, of which RANDOM_SHARE are random
RANDOM_SHARE = 0.25
POPULATION = 64
GENERATIONS = 4
EMPTY_GENERATIONS = 2  # in a row, until untried points are listed instead


def point_key(knobs: Mapping[str, Any]) -> str:
    """Return a point as text, equal for equal knobs."""
    return json.dumps(dict(knobs), sort_keys=True)


def ratios(challenger: list[float], incumbent: list[float]) -> tuple[float, float, float]:
    """Return quartiles and median of challenger / incumbent, turn by turn: (q1, median, q3)."""
    quotients = np.array(challenger) / np.array(incumbent)
    q1, median, q3 = np.quantile(quotients, [0.25, 0.5, 0.75])
    return float(q1), float(median), float(q3)


@dataclass
class Search:
    """State of one task's search.

    Attributes
    ----------
    space : Space
        Points to choose from.
    seed : int
        Same seed and same results, same proposals.
    scores : dict of str to float
        Point -> log(time / the default's time); failed points are inf.
    pending : set of str
        Points that were proposed and not reported yet.
    incumbent : dict
        The best point so far.
    history : list of float
        The incumbent's time over the default's after each trial.
    """

    space: Space
    seed: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)
    incumbent: dict[str, Any] = field(default_factory=dict)
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.incumbent = dict(self.space.default)
        self.scores[point_key(self.incumbent)] = 0.0
        self.model = KnobModel(self.space, self.seed)
        self._queue = self.space.neighbours(self.incumbent)
        self._evolution: Evolution | None = None
        self._fitted = 0

    @property
    def trials(self) -> int:
        """Points tried besides the default."""
        return len(self.scores) - 1

    @property
    def exhausted(self) -> bool:
        """Whether every point was tried or is being tried."""
        return len(self.scores) + len(self.pending) >= self.space.size

    @property
    def best_ratio(self) -> float:
        """Time of the incumbent over the default's."""
        return math.exp(self.scores[point_key(self.incumbent)])

    def next(self) -> dict[str, Any] | None:
        """Propose an untried point; None when all were tried."""
        if self.exhausted:
            return None
        self._fit()
        point = self._queued()
        for _ in range(EMPTY_GENERATIONS):
            if point is not None:
                break
            self._queue = self._generation()
            point = self._queued()
        if point is None:
            left = [p for p in self.space.points() if self._new(p)]
            point = left[int(np.argmin(self.model.predict(left)))]
        self.pending.add(point_key(point))
        return point

    def dropped(self, point: Mapping[str, Any]) -> None:
        """Take back a proposal that nobody measured; it may come again."""
        self.pending.discard(point_key(point))

    def failed(self, point: Mapping[str, Any]) -> None:
        """Note that a point cannot be kept."""
        self._note(point, math.inf)

    def measured(
        self, point: Mapping[str, Any], against: Mapping[str, Any], ratio: tuple[float, ...]
    ) -> bool:
        """Note a point's (q1, median, q3) time relative to another; returns whether it won."""
        score = self.scores.get(point_key(against), 0.0) + math.log(ratio[1])
        agreed = ratio[1] < 1 - MIN_WIN and ratio[2] < 1
        won = agreed and score < self.scores[point_key(self.incumbent)]
        if won:
            self.incumbent = dict(point)
        self._note(point, score)
        return won

    def _note(self, point: Mapping[str, Any], score: float) -> None:
        self.pending.discard(point_key(point))
        self.scores[point_key(point)] = score
        self.history.append(self.best_ratio)
        if self._evolution is not None:
            self._evolution.tell(point, score)

    def _new(self, point: Mapping[str, Any]) -> bool:
        key = point_key(point)
        return key not in self.scores and key not in self.pending

    def _queued(self) -> dict[str, Any] | None:
        while self._queue:
            point = self._queue.pop(0)
            if self._new(point):
                return point
        return None

    def _fit(self) -> None:
        if self._fitted != len(self.scores):
            self._fitted = len(self.scores)
            self.model.fit([json.loads(k) for k in self.scores], list(self.scores.values()))

    def _generation(self) -> list[dict[str, Any]]:
        if self._evolution is None:
            self._evolution = Evolution(self.space, self.model, self.seed)
            for key, score in self.scores.items():
                self._evolution.tell(json.loads(key), score)
        return self._evolution.generation()


class Evolution:
    """MetaSchedule's EvolutionarySearch over a space's carrier, asked and told step by step."""

    def __init__(self, space: Space, model: KnobModel, seed: int):
        import tvm
        from tvm.s_tir import meta_schedule as ms

        self.space, self._ms = space, ms
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=POPULATION,
            init_measured_ratio=0.25,
            init_min_unmeasured=1,
            genetic_num_iters=GENERATIONS,
            eps_greedy=RANDOM_SHARE,
        )
        generator = ms.space_generator.ScheduleFn(
            sampler(space),
            sch_rules=[],
            postprocs=[],
            mutator_probs={_mutator(random.Random(seed)): 1.0},
        )
        with _without_tensor_intrinsics():
            self._context = ms.TuneContext(
                carrier(),
                # Only a name here: nothing in these spaces depends on the target.
                target=tvm.target.Target({"kind": "llvm", "num-cores": 1}),
                space_generator=generator,
                search_strategy=strategy,
                num_threads=1,  # the mutator and the model are Python
                rand_state=seed + 1,
            )
        self._database = ms.database.MemoryDatabase()
        self._workload = self._database.commit_workload(carrier())
        self._context.pre_tuning(
            max_trials=1 << 30,
            num_trials_per_iter=BATCH,
            database=self._database,
            cost_model=meta_schedule_model(model),
        )

    def generation(self) -> list[dict[str, Any]]:
        """Return the points that one round of evolution proposes, best predicted first."""
        candidates = self._context.generate_measure_candidates()
        if not candidates:
            return []
        # The strategy only counts these results; measurements reach it through the database.
        result = self._ms.runner.RunnerResult([1.0], None)
        self._context.notify_runner_results(candidates, [result] * len(candidates))
        return [knobs_of(candidate.sch) for candidate in candidates]

    def tell(self, point: Mapping[str, Any], score: float) -> None:
        """Add a measured point to the ancestors; failed ones have no descendants."""
        if not math.isfinite(score):
            return
        from tvm.s_tir import Schedule

        schedule = Schedule(carrier())
        sampler(self.space)(schedule, point)
        record = self._ms.database.TuningRecord(
            schedule.trace, self._workload, [math.exp(score)], self._context.target, []
        )
        self._database.commit_tuning_record(record)


def _mutator(chance: random.Random) -> Any:
    """Return a mutator of categorical decisions: mostly to a neighbour, else to any value.

    TVM's own mutators look for the annotations of its own schedule rules.
    """
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.mutator import PyMutator

    @derived_object
    class Mutator(PyMutator):
        """Changes one decision."""

        def _initialize_with_tune_context(self, context: Any) -> None:
            """Nothing to learn from the context."""

        def apply(self, trace: Any, _state: Any = None) -> Any:
            """Return the trace with another decision, or None when there is no other."""
            instructions = [
                i for i in trace.insts if i.kind.name == "SampleCategorical" and len(i.attrs[0]) > 1
            ]
            if not instructions:
                return None
            instruction = chance.choice(instructions)
            count, now = len(instruction.attrs[0]), int(trace.decisions[instruction])
            near = [d for d in (now - 1, now + 1) if 0 <= d < count]
            every = [d for d in range(count) if d != now]
            decision = chance.choice(near if chance.random() < 0.6 else every)
            return trace.with_decision(instruction, decision, True)

        def clone(self) -> Any:
            return _mutator(chance)

    return Mutator()


@contextmanager
def _without_tensor_intrinsics() -> Iterator[None]:
    """Keep ``TuneContext`` from importing TVM's tensor intrinsics.

    Its constructor (0.27) parses the TVMScript of every intrinsic that TVM has, one to two minutes
    on a small machine; the schedules here use none of them.
    """
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]
