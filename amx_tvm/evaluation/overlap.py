"""How much of a test text a calibration text contains."""

from __future__ import annotations

from collections.abc import Sequence

RUN = 32  # equal consecutive tokens that count as the same passage


def overlap(calibration: Sequence[int], test: Sequence[int]) -> float:
    """Share of the test's runs of 32 tokens that also occur in the calibration text (0 to 1).

    Test runs are taken every 32 tokens, calibration runs at every position, so a passage is found
    wherever it starts.
    """
    calibration, test = list(calibration), list(test)
    if len(calibration) < RUN or len(test) < RUN:
        return 0.0
    seen = {tuple(calibration[i : i + RUN]) for i in range(len(calibration) - RUN + 1)}
    starts = range(0, len(test) - RUN + 1, RUN)
    return sum(tuple(test[i : i + RUN]) in seen for i in starts) / len(starts)
