"""Sequences: tokens whose keys and values are in the cache, to be extended, forked, rolled back.

A `Sequence` mirrors in ``tokens`` what the cache holds of it. Text generation, chats that reuse
the conversation so far, and scoring are all written with `append`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.kv import KVCache
from amx_tvm.runtime.model import Model
from amx_tvm.runtime.sampler import BROKEN_LOGITS


class Sequence:
    """Tokens in the cache, made by `Engine.sequence` or `fork`; close it, or use it in `with`."""

    def __init__(self, model: Model, cache: KVCache, handle: int, tokens: list[int]):
        self._model = model
        self._cache = cache
        self._handle: int | None = handle
        self.tokens = tokens
        self._promised = -1  # the token that a step ahead started from

    def __len__(self) -> int:
        return len(self.tokens)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def handle(self) -> int:
        """The sequence's id in the cache; GenerationError once it is closed."""
        if self._handle is None:
            raise GenerationError("this sequence is closed; start another with engine.sequence()")
        return self._handle

    def append(self, tokens: Iterable[int]) -> np.ndarray:
        """Add tokens and return the float32 logits [vocab] that follow the last one.

        More than one token runs as prefill, in chunks; one token as a decode step.

        Raises
        ------
        GenerationError
            No token, an id outside the vocabulary, or more than the context or the cache holds.
        """
        if isinstance(tokens, list) and len(tokens) == 1:
            return decode_batch([self], tokens)[0]
        ids = self._model.check_tokens(tokens)
        if not ids.size:
            raise GenerationError("no tokens to append, expected at least one")
        return self._run(ids, 1)[-1]

    @property
    def chooses(self) -> bool:
        """Whether `choose` is there: the device can take the most likely token itself."""
        return self._model.chooses

    def choose(self, token: int) -> int:
        """Add one token and return the most likely next one; the logits stay on the device.

        The step behind is started too, as if the token returned here came next.
        """
        self._model.check_tokens([token])
        cache, greedy = self._cache, self._model.greedy
        if token != self._promised or not cache.adopt(self.handle):
            self._check_length(1)
            with cache.forward([self.handle], [1]) as arguments:
                greedy.start(token, arguments)
        self.tokens.append(token)
        if len(self) < self._model.context_length and cache.available_pages():
            with cache.ahead(self.handle, greedy.finish) as arguments:
                greedy.follow(arguments)
            chosen = greedy.wait()
        else:
            chosen = greedy.finish()
        self._promised = chosen
        if chosen < 0:
            raise GenerationError(BROKEN_LOGITS)
        return chosen

    def score(self, tokens: Iterable[int]) -> np.ndarray:
        """Add tokens and return the float32 logits [len(tokens), vocab] that follow each."""
        ids = self._model.check_tokens(tokens)
        if not ids.size:
            return np.zeros((0, self._model.vocab_size), np.float32)
        return self._run(ids, ids.size)

    def _check_length(self, count: int) -> None:
        """Raise GenerationError where more tokens exceed the context."""
        limit = self._model.context_length
        if len(self) + count > limit:
            raise GenerationError(
                f"{count} tokens after {len(self)} exceed the context of {limit} tokens; "
                "shorten the prompt, or load with a larger context_length if the model allows it"
            )

    def _run(self, ids: np.ndarray, wanted: int) -> np.ndarray:
        """Run tokens [n] in chunks; return the logits of the last ``wanted`` rows."""
        self._check_length(ids.size)
        self._cache.check_room([self.handle], [ids.size])
        rows = []
        for start in range(0, ids.size, self._model.chunk):
            part = ids[start : start + self._model.chunk]
            left = ids.size - start - part.size  # rows behind this chunk
            count = min(part.size, max(0, wanted - left))
            rows.append(self._model.forward(self._cache, [self.handle], [part.size], part, [count]))
            self.tokens.extend(part.tolist())
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    def fork(self, position: int | None = None) -> Sequence:
        """Return a new sequence that shares the first ``position`` tokens (default: all)."""
        child = self._cache.fork(self.handle, position)
        return Sequence(self._model, self._cache, child, self.tokens[:position])

    def rollback(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        self._cache.rollback(self.handle, count)
        del self.tokens[len(self.tokens) - count :]

    def keep_prefix(self, tokens: list[int]) -> int:
        """Roll back to the longest common prefix with ``tokens`` and return its length.

        At least one of ``tokens`` is left to append, since the logits after it are wanted.
        """
        common = 0
        for mine, theirs in zip(self.tokens, tokens[:-1], strict=False):
            if mine != theirs:
                break
            common += 1
        self.rollback(len(self) - common)
        return common

    def close(self) -> None:
        """Free the sequence's pages; closing twice is harmless."""
        if self._handle is not None:
            self._cache.remove(self._handle)
            self._handle = None


def decode_batch(sequences: list[Sequence], tokens: list[int]) -> np.ndarray:
    """Add one token to each sequence in one call; return float32 logits [len(sequences), vocab]."""
    first = sequences[0]
    ids = first._model.check_step(tokens)
    for sequence in sequences:
        sequence._check_length(1)
    counts = [1] * len(sequences)
    handles = [sequence.handle for sequence in sequences]
    logits = first._model.forward(first._cache, handles, counts, ids, counts)
    for sequence, token in zip(sequences, ids, strict=True):
        sequence.tokens.append(token)
    return logits
