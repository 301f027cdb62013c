"""The cost model: XGBoost over decisions, as MetaSchedule's search asks for it.

MetaSchedule's own XGBoost model reads its features off loop nests, and a carrier (decisions.py) has
none; here a candidate's features are its decisions themselves: for each knob the position of its
value among the values in rising order, and one column a value, because few knobs are monotonic.
What is predicted is log(time / the default's time).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from amx_tvm.errors import TuningError
from amx_tvm.extras import require
from tuning.spaces import Space

# Few measurements, a few per cent of noise: small trees, and leaves that may hold one of them.
PARAMETERS = {
    "max_depth": 3,
    "eta": 0.15,
    "lambda": 0.1,
    "min_child_weight": 0,
    "nthread": 1,
    "verbosity": 0,
}
ROUNDS = 60


def require_xgboost() -> Any:
    """Import XGBoost.

    Raises
    ------
    TuningError
        When it is not installed.
    """
    return require("xgboost", "tune", "the search's cost model", TuningError)


class KnobModel:
    """Predicts log(time / default's time) of a space's points from those measured so far."""

    def __init__(self, space: Space, seed: int = 0):
        self.space, self.seed = space, seed
        self._xgboost = require_xgboost()
        self._booster: Any = None

    def features(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return one row a point: rank of each value, then one-hot values."""
        rows = []
        for point in points:
            row: list[float] = []
            for name, values in self.space.knobs.items():
                at = values.index(point[name])
                row.append(at / max(1, len(values) - 1))
                row += [float(i == at) for i in range(len(values))]
            rows.append(row)
        return np.array(rows, np.float32)

    def fit(self, points: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> None:
        """Train anew; infinite scores (failed points) count as twice the worst measured time."""
        known = [s for s in scores if math.isfinite(s)]
        if not known:
            self._booster = None
            return
        worst = max(known) + math.log(2)
        target = np.array([s if math.isfinite(s) else worst for s in scores], np.float32)
        data = self._xgboost.DMatrix(self.features(points), label=target, nthread=1)
        parameters = {**PARAMETERS, "seed": self.seed, "base_score": float(np.median(known))}
        self._booster = self._xgboost.train(parameters, data, num_boost_round=ROUNDS)

    def predict(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return predicted log ratios; zeros before anything was measured."""
        if self._booster is None or not points:
            return np.zeros(len(points))
        data = self._xgboost.DMatrix(self.features(points), nthread=1)
        return self._booster.predict(data).astype(np.float64)
