"""The search: MetaSchedule's evolutionary search over a space's decisions, one task's state.

MetaSchedule proposes (evolution.py: a population of traces is mutated and ranked by the cost
model, a share is random), this module says what a measurement means. TVM's own measuring loop is
not used: it knows absolute seconds only and counts every failure as 1e10 of them. Here

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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tuning.cost_model import KnobModel
from tuning.evolution import Evolution
from tuning.spaces import Space

MIN_WIN = 0.005  # of the time: smaller wins are kept out of the chain of incumbents
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
            self._evolution = Evolution(self.space, self.model.predict, self.seed)
            for key, score in self.scores.items():
                self._evolution.tell(json.loads(key), score)
        return self._evolution.generation()
