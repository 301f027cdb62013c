"""How much of a prompt runs between two tokens of those that decode: as much as keeps their pace.

Where chunks of prompts can pause, they are large, since a row of a large chunk costs least, and
between their kernels run the others' steps: as soon as the next kernel could end too late.

Elsewhere a chunk runs for each step of theirs, the largest that, by what the last ones took, keeps
both within a few times the step alone: what a row costs depends on how long the prompt is already,
and a chunk is much like the one before it. Sizes are rungs of a ladder: kernels compute rows in
blocks, so that not every size has a time of its own.

Those that decode at their start make way: answers that were asked for together get their first
tokens soonest, and all of them their last, where all prompts come first.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from amx_tvm.runtime.scheduler import Scheduler
from amx_tvm.runtime.turns import Parts

_SLOWER = 3.2  # times of a quiet step that come between two tokens while there are prompts
_APART = 2.4  # the same where chunks pause: what holds a step up has room beside it
_LEAST = 0.6  # of a step's time that a chunk has at least between two of them
_PAUSING = 64  # rows of a chunk that pauses: more cost no less each, fewer up to a third more
_FIXED = 4  # rows whose time a chunk takes beside that of its own
# Rows of a chunk, at most a step's: kernels compute eight rows at once.
_LADDER = (8, 16, 24, 32, 40, *(n << i for i in range(9) for n in (48, 64)))
_START = 16  # tokens of an answer's start
_WEIGHT, _OF_CHUNK = 0.2, 0.5  # of the newest measurement of a step, and of a chunk
_SLOW = 1.25  # times what is known that a measurement counts at most


class Pace:
    """Steps a scheduler and sizes its chunks by what steps were seen to take.

    Parameters
    ----------
    scheduler : Scheduler
        Nobody else steps it.
    told : callable
        Called behind a step of those that decode within a chunk, as its caller does behind others.
    """

    def __init__(self, scheduler: Scheduler, told: Callable[[], None]):
        self._scheduler, self._turns, self._told = scheduler, scheduler.turns, told
        self._turns.limit, self._turns.between = self._limit, self._between
        self._ladder = [n for n in _LADDER if n <= self._turns.most] or [self._turns.most]
        self._quiet: dict[int, float] = {}  # seconds of a step behind its like, by its requests
        self._behind: dict[int, float] = {}  # and of one behind a chunk, which finds cold caches
        self._rung = 1
        self._row: float | None = None  # seconds of a row of a chunk
        self._decoding = 0  # requests that a chunk holds up, while it is sized
        self._chunk = False  # whether the last step computed any of a prompt
        self._looked = self._due = 0.0  # when a chunk was between kernels, and when to pause it
        self._longest = 0.0  # seconds of its kernels

    def step(self) -> bool:
        """Run one step; return whether anything is left to do."""
        self._decoding = 0
        start = time.perf_counter()
        more = self._scheduler.step()
        seconds = time.perf_counter() - start
        decoding, rows = self._turns.last
        if decoding and not rows:
            self._note(self._behind if self._chunk else self._quiet, decoding, seconds)
        elif self._decoding and not self._due and rows >= self._ladder[self._rung]:
            self._learn(rows, seconds, 0 if decoding else self._decoding)
        self._chunk = rows > 0
        if self._chunk and self._has_time(time.perf_counter()):
            self._turns.go_on()
        return more

    def _limit(self, decoding: Parts) -> int:
        """Return how many rows of prompts may run for a step of these."""
        going, self._due = self._due if self._chunk else 0.0, 0.0
        if all(len(handle.result.token_ids) <= _START for handle, _ in decoding):
            return self._ladder[-1]
        self._decoding = len(decoding)
        if not self._scheduler.pauses:
            return self._ladder[self._rung]
        self._longest, self._looked = 0.0, time.perf_counter()
        self._due = going or self._looked + self._apart()
        return min(_PAUSING, self._turns.most)

    def _has_time(self, now: float) -> bool:
        """Whether a kernel of a chunk that pauses may follow before those that decode are due."""
        return bool(self._due) and now + self._longest <= self._due

    def _apart(self) -> float:
        """Return how many seconds of a chunk may run between two steps of those that decode.

        A machine that has become slower since the last quiet step does not stop the prompts.
        """
        behind = self._behind.get(self._decoding, self._quiet.get(self._decoding, 0.0))
        wanted = _APART * self._quiet.get(self._decoding, behind) - behind
        return max(wanted, _LEAST * behind)

    def _between(self, step: Callable[[], int]) -> None:
        """Run a step of those that decode where the chunk's next kernel could end too late."""
        now = time.perf_counter()
        self._longest, self._looked = max(self._longest, now - self._looked), now
        if not self._due or self._has_time(now):
            return
        decoding = step()
        self._told()
        self._looked = time.perf_counter()
        if not decoding:  # nobody is left, or has pages: a step of its own sees to that
            self._due = 0.0
            return
        self._decoding = decoding
        self._note(self._behind, decoding, self._looked - now)
        self._due = self._looked + self._apart()

    @staticmethod
    def _note(times: dict[int, float], decoding: int, seconds: float) -> None:
        times[decoding] = _nearer(times.get(decoding, seconds), seconds, _WEIGHT)

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
