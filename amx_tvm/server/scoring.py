"""Log-probabilities of a prompt's own tokens: what ``echo`` with ``logprobs`` asks for."""

from __future__ import annotations

from collections.abc import Callable

from amx_tvm.runtime import Engine
from amx_tvm.runtime.result import TokenLogprobs
from amx_tvm.runtime.sampler import logprobs

_ROWS = 32  # tokens a step: logits of all of them are held at once


class Scoring:
    """A job of the engine's thread that scores one prompt, some tokens a step.

    Parameters
    ----------
    engine : Engine
        The model.
    prompt : list of int
        Token ids, checked.
    count : int
        How many most likely tokens are told beside each.
    done : callable
        Called on the engine's thread with one TokenLogprobs for each token but the first, or with
        the exception that ended it.
    cancelled : callable
        Whether nobody waits for it any more.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        count: int,
        done: Callable[[list[TokenLogprobs] | Exception], None],
        cancelled: Callable[[], bool],
    ):
        self._prompt, self._count = prompt, count
        self._done, self._cancelled = done, cancelled
        self._found: list[TokenLogprobs] = []
        self._sequence = None if len(prompt) < 2 else engine.sequence()

    @property
    def active(self) -> int:
        """Sequences that it holds."""
        return 0 if self._sequence is None else 1

    def step(self) -> bool:
        """Score some tokens; return whether any are left."""
        start = len(self._found)
        tokens = self._prompt[start : min(start + _ROWS, len(self._prompt) - 1)]
        if self._sequence is None or self._cancelled() or not tokens:
            self._end()
            return False
        for row, token in zip(
            self._sequence.score(tokens), self._prompt[start + 1 :], strict=False
        ):
            self._found.append(logprobs(row, token, self._count))
        return True

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self._end(error)

    def _end(self, error: Exception | None = None) -> None:
        if self._sequence is not None:
            self._sequence.close()
            self._sequence = None
        self._done(self._found if error is None else error)
