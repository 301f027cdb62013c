"""How much of a prompt runs beside those that decode: as much as keeps their pace.

A step that decodes for others and computes a chunk of a prompt takes longer by the chunk. The chunk
follows from what a row of a prompt was measured to cost and from the time between tokens that is
aimed at: twice a plain step's, and not less than a floor, so that prompts always get on.
"""

from __future__ import annotations

import time

from amx_tvm.runtime.scheduler import Scheduler

_SLOWER = 2.0  # times of a plain step that a step with a prompt beside it may take
_LEAST, _MOST = 16, 512  # rows of a chunk
_WEIGHT = 0.2  # of the newest measurement


class Pace:
    """Steps a scheduler and sets ``prefill_rows`` by what steps were seen to take."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._plain: float | None = None  # seconds of a step that only decodes
        self._row: float | None = None  # seconds of one more row of a prompt
        scheduler.prefill_rows = 64

    def step(self) -> bool:
        """Run one step; return whether anything is left to do."""
        scheduler = self._scheduler
        start = time.perf_counter()
        more = scheduler.step()
        seconds = time.perf_counter() - start
        decoding, rows = scheduler.last_step
        if decoding and not rows:
            self._plain = _mixed(self._plain, seconds)
        elif decoding and self._plain is not None:
            self._row = _mixed(self._row, max(seconds - self._plain, 1e-6) / rows)
        if rows and self._plain is not None and self._row is not None:
            wanted = (_SLOWER - 1.0) * self._plain / self._row
            scheduler.prefill_rows = int(min(max(wanted, _LEAST), _MOST))
        return more


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
