"""The search: which point of a small discrete space is measured next, and what counts as better.

Spaces here have 7 to some hundred points, all of them valid kernels, so this is a plain search and
not MetaSchedule's: an additive model of log(time) over the knobs' values, fitted by ridge
regression to everything measured so far, ranks the untried points; every third trial is a random
one, against the model's blindness to knobs that act together.

A challenger is measured in turns with the incumbent and wins only if three quarters of the turns
agree. Scores are log ratios to the default, chained through the incumbents that were measured
beside each challenger, so a machine that slows down between two trials changes none of them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tuning.spaces import Space

RIDGE = 0.3
RANDOM_EVERY = 3
MIN_WIN = 0.005  # of the time: smaller wins are kept out of the chain of incumbents


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
    incumbent : dict
        The best point so far.
    """

    space: Space
    seed: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    incumbent: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.incumbent = dict(self.space.default)
        self.scores[point_key(self.incumbent)] = 0.0
        self._points = list(self.space.points())

    @property
    def trials(self) -> int:
        """Points tried besides the default."""
        return len(self.scores) - 1

    @property
    def best_ratio(self) -> float:
        """Time of the incumbent over the default's."""
        return math.exp(self.scores[point_key(self.incumbent)])

    def next(self) -> dict[str, Any] | None:
        """Propose an untried point; None when all were tried."""
        left = [p for p in self._points if point_key(p) not in self.scores]
        if not left:
            return None
        chance = random.Random(f"{self.seed}/{len(self.scores)}")
        if self.trials % RANDOM_EVERY == RANDOM_EVERY - 1:
            return chance.choice(left)
        predicted = self._predict(left)
        lowest = min(predicted)
        return chance.choice(
            [p for p, v in zip(left, predicted, strict=True) if v <= lowest + 1e-9]
        )

    def failed(self, point: Mapping[str, Any]) -> None:
        """Note that a point cannot be kept."""
        self.scores[point_key(point)] = math.inf

    def measured(
        self, point: Mapping[str, Any], against: Mapping[str, Any], ratio: tuple[float, ...]
    ) -> bool:
        """Note a point's (q1, median, q3) time relative to another; returns whether it won."""
        score = self.scores.get(point_key(against), 0.0) + math.log(ratio[1])
        self.scores[point_key(point)] = score
        beaten = point_key(against) == point_key(self.incumbent)
        won = beaten and ratio[1] < 1 - MIN_WIN and ratio[2] < 1
        if won:
            self.incumbent = dict(point)
        return won

    def _row(self, point: Mapping[str, Any]) -> list[float]:
        """One-hot values of a point, with a constant in front."""
        hot = [float(point[n] == v) for n, values in self.space.knobs.items() for v in values]
        return [1.0, *hot]

    def _predict(self, points: list[dict[str, Any]]) -> list[float]:
        """Predict log(time) by an additive model of the knobs."""
        valid = [(json.loads(k), s) for k, s in self.scores.items() if math.isfinite(s)]
        a = np.array([self._row(p) for p, _ in valid])
        y = np.array([s for _, s in valid])
        weights = np.linalg.solve(a.T @ a + RIDGE * np.eye(a.shape[1]), a.T @ y)
        return [float(np.dot(self._row(p), weights)) for p in points]
