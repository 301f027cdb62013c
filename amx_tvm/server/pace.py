"""How much of a prompt runs for each step of those that decode: as much as keeps their pace.

Between two of their tokens there is a step of their own and a chunk of prompts. The chunk is the
largest that, by what the last ones took, keeps both within a few times the step alone: what a row
costs depends on how long the prompt is already, and a chunk is much like the one before it. Sizes
are rungs of a ladder: kernels compute rows in blocks, so that not every size has a time of its own.

Those that decode at their start make way: answers that were asked for together get their first
tokens soonest, and all of them their last, where all prompts come first.
"""

from __future__ import annotations

import time

from amx_tvm.runtime.scheduler import Scheduler
from amx_tvm.runtime.turns import Parts

_SLOWER = 3.2  # times of a quiet step that come between two tokens while there are prompts
_FIXED = 4  # rows whose time a chunk takes beside that of its own
# Rows of a chunk, at most a step's: kernels compute eight rows at once.
_LADDER = (8, 16, 24, 32, 40, *(n << i for i in range(9) for n in (48, 64)))
_START = 16  # tokens of an answer's start
_WEIGHT, _OF_CHUNK = 0.2, 0.5  # of the newest measurement of a step, and of a chunk
_SLOW = 1.25  # times what is known that a measurement counts at most


class Pace:
    """Steps a scheduler and sizes its chunks by what steps were seen to take."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler, self._turns = scheduler, scheduler.turns
        self._turns.limit = self._limit
        self._ladder = [n for n in _LADDER if n <= self._turns.most] or [self._turns.most]
        self._quiet: dict[int, float] = {}  # seconds of a step behind its like, by its requests
        self._behind: dict[int, float] = {}  # and of one behind a chunk, which finds cold caches
        self._rung = 1
        self._row: float | None = None  # seconds of a row of a chunk
        self._decoding = 0  # requests that a chunk holds up, while it is sized
        self._chunk = False  # whether the last step computed any of a prompt

    def step(self) -> bool:
        """Run one step; return whether anything is left to do."""
        self._decoding = 0
        start = time.perf_counter()
        more = self._scheduler.step()
        seconds = time.perf_counter() - start
        decoding, rows = self._turns.last
        if decoding and not rows:
            times = self._behind if self._chunk else self._quiet
            known = times.get(decoding, seconds)
            times[decoding] = _nearer(known, seconds, _WEIGHT)
        elif rows >= self._ladder[self._rung] and self._decoding:
            self._learn(rows, seconds, 0 if decoding else self._decoding)
        self._chunk = rows > 0
        return more

    def _limit(self, decoding: Parts) -> int:
        """Return how many rows of prompts may run for a step of these."""
        if all(len(handle.result.token_ids) <= _START for handle, _ in decoding):
            return self._ladder[-1]
        self._decoding = len(decoding)
        return self._ladder[self._rung]

    def _learn(self, rows: int, seconds: float, apart: int) -> None:
        """Choose the next chunk's rung by one of ``rows`` that took so long.

        ``apart`` requests have a step of their own beside it; 0 where it was theirs too.
        """
        behind = self._behind.get(apart, 0.0)
        quiet = self._quiet.get(self._decoding, behind)
        if not quiet:
            return
        row = seconds / (rows + _FIXED)
        self._row = row if self._row is None else _nearer(self._row, row, _OF_CHUNK)
        wanted = (_SLOWER * quiet - behind) / self._row - _FIXED
        self._rung = max(sum(size <= wanted for size in self._ladder) - 1, 0)


def _nearer(known: float, seconds: float, weight: float) -> float:
    """Return what is known after a further measurement.

    One that the machine held up says little: it counts as a somewhat slower one.
    """
    return known + weight * (min(seconds, _SLOW * known) - known)
