"""Which tokens an answer's form allows next, computed for all answers of a step at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

_END = "EndOfSentence"  # llguidance's word for an end that was chosen where more could have come


class Mask:
    """What one answer may go on with: the sampler asks it before each token.

    Parameters
    ----------
    matcher : llguidance.LLMatcher
        The compiled form at its start; the mask's own.
    vocabulary : int
        How many tokens there are.
    refused : callable
        Makes the error that a form raises which asks for more work than llguidance does.
    form : object
        Of what it is the mask.
    beside : Executor
        Where a mask is computed beside the engine's thread.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        vocabulary: int,
        refused: Callable[[str], Exception],
        form: Any,
        beside: Executor,
    ):
        self.form, self._beside = form, beside
        self._matcher, self._vocabulary, self._refused = matcher, vocabulary, refused
        self._words: np.ndarray | None = None  # int32 [1, vocab / 32], a bit a token
        self._seen = 0  # tokens that the matcher, and so the words, stand behind
        self._ended = False  # whether the end of the text is among them
        self._ahead: Future[Any] | None = None

    def __call__(self, tokens: list[int]) -> np.ndarray:
        """Return bool [vocab] for the token behind these; behind the form's end there is none."""
        self._catch_up(tokens)
        if self._ended or self._matcher.stop_reason() == _END:
            return np.zeros(self._vocabulary, bool)
        words = self._words if self._words is not None else self._compute()
        if self._matcher.is_error():
            raise self._refused(self._matcher.get_error())
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return bits[: self._vocabulary].view(bool)

    def begin(self, tokens: list[int]) -> None:
        """Compute what is asked for behind these tokens on another core."""
        self._catch_up(tokens)
        if not self._ended and self._words is None:
            self._ahead = self._beside.submit(self._compute)

    def _compute(self) -> np.ndarray:
        words = llguidance.numpy.allocate_token_bitmask(1, self._vocabulary)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, words)
        self._words = words
        return words

    def take(self, tokens: list[int], token: int) -> bool:
        """Go on with a token behind these where the form allows it; return whether it does.

        This takes a fraction of a mask's time.
        """
        self._catch_up(tokens)
        if self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token]):
            return False
        self._words = None
        self._seen += 1
        return True

    def _catch_up(self, tokens: list[int]) -> None:
        """Bring the matcher behind these tokens."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.result()
        if self._seen != len(tokens):
            self._words = None
            self._consume(tokens[self._seen :])

    def _consume(self, tokens: list[int]) -> None:
        for token in tokens:
            self._ended |= self._matcher.is_stopped()  # the end of the text alone may follow
            self._ended or self._matcher.consume_token(token)
            self._ended |= self._matcher.stop_reason() == _END
        self._seen += len(tokens)

    @staticmethod
    def _fill(masks: list[Mask], more: list[list[int]], executor: llguidance.LLExecutor) -> None:
        """Advance masks, and compute them all at once without Python's lock."""
        for mask, tokens in zip(masks, more, strict=True):
            mask._consume(tokens)
        words = llguidance.numpy.allocate_token_bitmask(len(masks), masks[0]._vocabulary)
        rows = [(mask._matcher, row) for row, mask in enumerate(masks)]
        llguidance.numpy.fill_next_token_bitmask_par(executor, rows, words)
        for row, mask in enumerate(masks):
            mask._words = words[row : row + 1]


class Ahead:
    """Computes masks behind each step, on several cores.

    Parameters
    ----------
    beside : bool
        Whether the next step begins meanwhile: a GPU's does. A CPU's steps need all cores, and
        wait at every barrier for a thread that has lost its own.
    """

    def __init__(self, beside: bool) -> None:
        self._thread = ThreadPoolExecutor(1, "masks") if beside else None
        self._executor: llguidance.LLExecutor | None = None

    def begin(self, masks: Iterable[tuple[Mask, list[int]]]) -> None:
        """Begin with masks behind these tokens; who asks one waits for it."""
        if self._executor is None:
            self._executor = llguidance.LLExecutor()
        asked, more = [], []
        for mask, tokens in masks:
            asked.append(mask)
            more.append(tokens[mask._seen :])
        if self._thread is None:
            Mask._fill(asked, more, self._executor)
            return
        future = self._thread.submit(Mask._fill, asked, more, self._executor)
        for mask in asked:
            mask._ahead = future
