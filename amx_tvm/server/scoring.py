"""Log-probabilities of prompts' own tokens: what ``echo`` with ``logprobs`` asks for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from amx_tvm.errors import GenerationError
from amx_tvm.runtime import Engine
from amx_tvm.runtime.result import TokenLogprobs
from amx_tvm.runtime.sampler import logprobs
from amx_tvm.runtime.scheduler import Scheduler

_ROWS = 32  # tokens a step: logits of all of them are held at once


@dataclass
class Score:
    """A prompt to be scored.

    Attributes
    ----------
    prompt : list of int
        Token ids, checked.
    count : int
        How many most likely tokens are told beside each.
    done : callable
        Called on the engine's thread with one TokenLogprobs for each token but the first, or with
        the exception that ended it.
    cancelled : callable
        Whether nobody waits for it any more.
    adapter : str or None
        By which LoRA adapter.
    """

    prompt: list[int]
    count: int
    done: Callable[[list[TokenLogprobs] | Exception], None]
    cancelled: Callable[[], bool]
    adapter: str | None = None
    found: list[TokenLogprobs] = field(default_factory=list)


class Scoring:
    """A job of the engine's thread: one prompt after another, some tokens a step.

    It takes a place and pages that ended answers keep; those of answers under way it waits for.

    Parameters
    ----------
    engine : Engine
        The model.
    scheduler : Scheduler
        What else runs.
    """

    def __init__(self, engine: Engine, scheduler: Scheduler):
        self._engine, self._scheduler = engine, scheduler
        self._waiting: deque[Score] = deque()
        self._sequence: Any = None

    @property
    def active(self) -> int:
        """Sequences that it holds."""
        return 0 if self._sequence is None else 1

    def add(self, score: Score) -> None:
        """Score a prompt once those before it are."""
        self._waiting.append(score)

    def step(self) -> bool:
        """Score some tokens; return whether any are left."""
        if not self._waiting:
            return False
        score = self._waiting[0]
        try:
            tokens = score.prompt[len(score.found) : -1][:_ROWS]
            if tokens and not score.cancelled():
                self._score(score, tokens)
            else:
                self._end(score.found)
        except GenerationError as error:
            if self._scheduler.prefixes.shed() or self._scheduler.active:
                return True  # once there is room
            self._end(error)
        except Exception as error:
            self._end(error)
        return bool(self._waiting)

    def fail(self, error: Exception) -> None:
        """End everything with an error."""
        while self._waiting:
            self._end(error)

    def _score(self, score: Score, tokens: list[int]) -> None:
        if self._sequence is None:
            self._sequence = self._engine.sequence(score.adapter)
        rows = self._sequence.score(tokens)
        following = score.prompt[len(score.found) + 1 :]
        score.found += [
            logprobs(row, token, score.count) for row, token in zip(rows, following, strict=False)
        ]

    def _end(self, outcome: list[TokenLogprobs] | Exception) -> None:
        if self._sequence is not None:
            self._sequence.close()
            self._sequence = None
        self._waiting.popleft().done(outcome)
