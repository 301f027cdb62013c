"""How much of a prompt runs for each step of those that decode: as much as keeps their pace.

Between two of their tokens there is a step of their own and a chunk of prompts. The chunk is sized
by what the last one took, so that both together take a few times the step alone: what a row costs
depends on how many there are and on how long the prompt is already, and a chunk is much like the
one before it. Those that decode at their start make way: answers that were asked for together get
their first tokens soonest, and all of them their last, where all prompts come first.
"""

from __future__ import annotations

import time

from amx_tvm.runtime.scheduler import Scheduler
from amx_tvm.runtime.turns import Parts

_SLOWER = 2.4  # times of a plain step that come between two tokens while there are prompts
_LEAST, _FIRST, _MOST = 8, 32, 512  # rows of a chunk
_START = 16  # tokens of an answer's start
_WEIGHT = 0.2  # of the newest measurement


class Pace:
    """Steps a scheduler and sizes its chunks by what steps were seen to take."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler, self._turns = scheduler, scheduler.turns
        self._turns.limit = self._limit
        self._plain: dict[int, float] = {}  # seconds of a step, by how many it continues
        self._rows = float(_FIRST)
        self._decoding = 0  # requests that a chunk holds up, while it is sized

    def step(self) -> bool:
        """Run one step; return whether anything is left to do."""
        self._decoding = 0
        start = time.perf_counter()
        more = self._scheduler.step()
        seconds = time.perf_counter() - start
        decoding, rows = self._turns.last
        if decoding and not rows:
            known = self._plain.get(decoding, seconds)
            self._plain[decoding] = known + _WEIGHT * (seconds - known)
        elif rows >= round(self._rows) and self._decoding in self._plain:
            plain = self._plain[self._decoding]
            self._learn(rows, seconds - plain if decoding else seconds, (_SLOWER - 1) * plain)
        return more

    def _limit(self, decoding: Parts) -> int:
        """Return how many rows of prompts may run for a step of these."""
        if all(len(handle.result.token_ids) <= _START for handle, _ in decoding):
            return _MOST
        self._decoding = len(decoding)
        return round(self._rows)

    def _learn(self, rows: int, seconds: float, wanted: float) -> None:
        """Size the next chunk by one of ``rows`` that took so long."""
        fits = rows * wanted / max(seconds, 1e-6)
        self._rows = min(max(fits, self._rows / 2, _LEAST), 2 * self._rows, _MOST)
