"""MetaSchedule's evolutionary search over a space, asked and told one generation at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tuning.decisions import carrier, knobs_of, sampler, schedule_of
from tuning.spaces import Space

BATCH = 4  # proposals of one generation, of which RANDOM_SHARE are random
RANDOM_SHARE = 0.25
POPULATION = 64
GENERATIONS = 4
SHARPNESS = 10.0  # of the scores by which MetaSchedule picks parents: e^-1 for 10 % more time

Predict = Callable[[Sequence[Mapping[str, Any]]], np.ndarray]


class Evolution:
    """A population of points.

    Parameters
    ----------
    space : Space
        Points to choose from.
    predict : callable
        Points -> log(time / the default's time) as a model expects it.
    seed : int
        Same seed, same calls: same proposals.
    """

    def __init__(self, space: Space, predict: Predict, seed: int):
        from tvm.s_tir import meta_schedule as ms

        self.space, self._ms = space, ms
        generator = ms.space_generator.ScheduleFn(
            sampler(space),
            sch_rules=[],
            postprocs=[],
            mutator_probs={_mutator(random.Random(seed)): 1.0},
        )
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=POPULATION,
            init_measured_ratio=0.25,
            init_min_unmeasured=1,
            genetic_num_iters=GENERATIONS,
            eps_greedy=RANDOM_SHARE,
        )
        self._context = _context(generator, strategy, seed + 1)
        self._database = ms.database.MemoryDatabase()
        self._workload = self._database.commit_workload(carrier())
        self._context.pre_tuning(
            max_trials=1 << 30,
            num_trials_per_iter=BATCH,
            database=self._database,
            cost_model=_cost_model(predict),
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
        """Add a measured point to the ancestors; failed ones (inf) have no descendants."""
        if math.isfinite(score):
            trace = schedule_of(self.space, point).trace
            record = self._ms.database.TuningRecord(
                trace, self._workload, [math.exp(score)], self._context.target, []
            )
            self._database.commit_tuning_record(record)


def _context(generator: Any, strategy: Any, seed: int) -> Any:
    """Return a TuneContext of the carrier.

    TVM's own constructor (0.27) first parses the TVMScript of every tensor intrinsic that it has,
    one to two minutes on a small machine; the schedules here use none of them.
    """
    from tvm.s_tir import meta_schedule as ms
    from tvm.s_tir.meta_schedule import _ffi_api
    from tvm.target import Target

    class Context(ms.TuneContext):
        def __init__(self) -> None:
            target = Target({"kind": "llvm", "num-cores": 1})  # only a name here
            self.__init_handle_by_constructor__(
                _ffi_api.TuneContext,
                *(carrier(), target, generator, strategy, "kernel"),
                *(1, seed, None),  # one thread: the mutator and the model are Python
            )
            _ffi_api.TuneContextInitialize(self)

    return Context()


def _cost_model(predict: Predict) -> Any:
    """Return MetaSchedule's ``CostModel`` of a prediction: higher scores are faster kernels."""
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.cost_model import PyCostModel

    @derived_object
    class Model(PyCostModel):
        """Training belongs to the search, which knows ratios and not only times."""

        def update(self, context: Any, candidates: Any, results: Any) -> None:
            """Nothing: the search trains the model when a measurement arrives."""

        def predict(self, context: Any, candidates: Any) -> np.ndarray:
            return np.exp(-SHARPNESS * predict([knobs_of(c.sch) for c in candidates]))

    return Model()


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
