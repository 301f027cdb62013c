"""Sequences: tokens whose keys and values are in the cache, to be extended, forked, rolled back.

A `Sequence` mirrors in ``tokens`` what the cache holds of it. Text generation, chats that reuse
the conversation so far, and scoring are all written with `append`. Whatever thread asks, the work
is done on the engine's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.choices import BROKEN, GREEDY, RowChoice
from amx_tvm.runtime.kv import KVCache
from amx_tvm.runtime.model import Model
from amx_tvm.runtime.result import TokenLogprobs
from amx_tvm.runtime.sampler import BrokenLogits
from amx_tvm.runtime.worker import Worker

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _on_thread(
    method: Callable[Concatenate[Sequence, _P], _R],
) -> Callable[Concatenate[Sequence, _P], _R]:
    """Let a method run on the engine's thread; refuse it while a generation is at work."""

    @functools.wraps(method)
    def run(self: Sequence, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        worker = self._worker
        if worker is None or worker.here:
            return method(self, *args, **kwargs)
        if self._reserved:
            raise GenerationError(
                "a generation is at work on this sequence; let it end, or close its stream first"
            )
        return worker.call(functools.partial(method, self, **kwargs), *args)

    return run


class Sequence:
    """Tokens in the cache, made by `Engine.sequence` or `fork`; close it, or use it in `with`."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        handle: int,
        tokens: list[int],
        worker: Worker | None = None,
    ):
        self._model = model
        self._cache = cache
        self._handle: int | None = handle
        self._worker = worker
        self._reserved = False
        self.tokens = tokens
        self._promised = -1  # the token that a step ahead started from, which the device chose
        self._row = 0  # of the sequence in that step
        self._long = model.long_after > 0 and len(tokens) > model.long_after

    def __del__(self) -> None:
        if self._handle is not None and self._worker is not None:
            self._worker.leave(self._cache.remove, self._handle)

    def __repr__(self) -> str:
        return f"<Sequence of {len(self.tokens)} tokens{'' if self.open else ', closed'}>"

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

    @property
    def open(self) -> bool:
        """Whether the sequence has not been closed."""
        return self._handle is not None

    @property
    def adapter(self) -> int:
        """The number of the sequence's adapter, -1 for none."""
        return self._cache.adapters.get(self.handle, -1)

    def reserve(self, cache: KVCache) -> None:
        """Let a generation that works in ``cache`` have the sequence to itself."""
        if cache is not self._cache:
            raise GenerationError("the sequence belongs to another engine, or to an earlier cache")
        if self._reserved:
            raise GenerationError("another generation is at work on this sequence")
        self._reserved = self.handle >= 0

    def unreserve(self) -> None:
        """Give it back."""
        self._reserved = False

    @_on_thread
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
        """Whether `choose` is there: the device can take the most likely token itself.

        It has no such steps for adapters.
        """
        return self._model.chooses > 0 and self.adapter < 0

    @property
    def is_ahead(self) -> bool:
        """Whether a step behind the last one has been started for the sequence."""
        return self._cache.is_ahead(self.handle)

    @_on_thread
    def choose(self, token: int) -> int:
        """Add one token and return the most likely next one; the logits stay on the device.

        The step behind is started too, as if the token returned here came next.
        """
        (chosen,) = choose_batch([self], [token])
        if chosen == BROKEN:
            raise BrokenLogits
        assert isinstance(chosen, int)  # nothing else was asked for
        return chosen

    @_on_thread
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
        self._turn(ids.size)
        self._cache.check_room([self.handle], [ids.size])
        return self._write(ids, wanted)

    def _turn(self, count: int) -> None:
        """Compute the keys again where ``count`` more tokens change the rotary frequencies."""
        held = self.tokens
        if self.turn(len(self) + count):
            self._write(np.array(held, np.int32), 0)

    def turn(self, length: int) -> bool:
        """Forget all tokens where a sequence of a length has other rotary frequencies.

        Longrope turns every token by the table of the sequence's length, as transformers does.
        Returns whether there was something to forget.
        """
        long = 0 < self._model.long_after < length
        if long == self._long:
            return False
        self._long = long
        if not self.tokens:
            return False
        adapter = self.adapter
        self._cache.remove(self.handle)
        self._handle, self.tokens = self._cache.add(adapter), []
        return True

    def given(self, ids: np.ndarray) -> np.ndarray:
        """Return token ids as the compiled functions take them; see `Model.long_after`."""
        return -1 - ids if self._long else ids

    def _write(self, ids: np.ndarray, wanted: int) -> np.ndarray:
        """Run tokens in chunks, without the checks of `_run`."""
        rows = []
        for start in range(0, ids.size, self._model.chunk):
            if self._worker is not None and self._worker.cancelled:
                raise GenerationError("whoever asked has given up")
            part = ids[start : start + self._model.chunk]
            left = ids.size - start - part.size  # rows behind this chunk
            count = min(part.size, max(0, wanted - left))
            given = self.given(part)
            rows.append(
                self._model.forward(self._cache, [self.handle], [part.size], given, [count])
            )
            self.tokens.extend(part.tolist())
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    @_on_thread
    def fork(self, position: int | None = None) -> Sequence:
        """Return a new sequence that shares the first ``position`` tokens (default: all)."""
        child = self._cache.fork(self.handle, position)
        forked = Sequence(self._model, self._cache, child, self.tokens[:position], self._worker)
        forked._long = self._long  # how its keys in the cache are turned
        return forked

    @_on_thread
    def rollback(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        self._cache.rollback(self.handle, count)
        del self.tokens[len(self.tokens) - count :]

    @_on_thread
    def keep_prefix(self, tokens: list[int]) -> int:
        """Roll back to the longest common prefix with ``tokens`` and return its length.

        At least one of ``tokens`` is left to append, since the logits after it are wanted.
        """
        common = common_prefix(self.tokens, tokens[:-1])
        self.rollback(len(self) - common)
        return common

    @_on_thread
    def close(self) -> None:
        """Free the sequence's pages; closing twice is harmless."""
        if self._handle is not None:
            self._cache.remove(self._handle)
            self._handle = None


def decode_batch(sequences: list[Sequence], tokens: list[int]) -> np.ndarray:
    """Add one token to each sequence in one call; return float32 logits [len(sequences), vocab]."""
    worker = sequences[0]._worker
    if worker is not None and not worker.here:
        return worker.call(decode_batch, sequences, tokens)
    first = sequences[0]
    ids = first._model.check_step(tokens)
    for sequence in sequences:
        sequence._check_length(1)
        sequence._turn(1)
    given = ids
    if first._model.long_after:
        given = [-1 - t if s._long else t for s, t in zip(sequences, ids, strict=True)]
    counts = [1] * len(sequences)
    handles = [sequence.handle for sequence in sequences]
    logits = first._model.forward(first._cache, handles, counts, given, counts)
    for sequence, token in zip(sequences, ids, strict=True):
        sequence.tokens.append(token)
    return logits


def choose_batch(
    sequences: list[Sequence],
    tokens: list[int],
    going: list[int] | None = None,
    choices: list[RowChoice] | None = None,
    masks: list[np.ndarray | None] | None = None,
) -> list[int | TokenLogprobs]:
    """Add one token to each sequence and return the next ones; the logits stay on the device.

    Parameters
    ----------
    sequences : list of Sequence
        At most `Model.chooses`.
    tokens : list of int
        A token of each.
    going : list of int, optional
        Which of them go on, as indices; by default all. The step behind is started for these too,
        as if the tokens returned here came next.
    choices : list of RowChoice, optional
        How each one's tokens are chosen; by default the most likely one is taken.
    masks : list of ndarray or None, optional
        What each one may choose now (`choices.mask_words`); no step is started ahead then, since
        the next masks depend on the tokens returned here.

    Returns
    -------
    list of int or TokenLogprobs
        The latter where log-probabilities are asked for; `choices.BROKEN` where the logits are,
        `choices.NOTHING` where a mask leaves nothing.
    """
    first = sequences[0]
    model, cache, steps = first._model, first._cache, first._model.steps
    model.check_step(tokens)
    handles = [sequence.handle for sequence in sequences]
    choices = [GREEDY] * len(handles) if choices is None else choices
    masks = masks if masks is not None and any(m is not None for m in masks) else None
    promised = all(s._promised == t for s, t in zip(sequences, tokens, strict=True))
    if promised and masks is None and cache.adopt(handles):
        rows = [sequence._row for sequence in sequences]
    else:
        for sequence in sequences:
            sequence._check_length(1)
        with cache.forward(handles, [1] * len(handles)) as arguments:
            steps.start(tokens, choices, arguments, *([masks] if masks else []))
        rows = list(range(len(handles)))
    for sequence, token in zip(sequences, tokens, strict=True):
        sequence.tokens.append(token)
        sequence._promised = -1
    going = list(range(len(handles))) if going is None else going
    going = going if masks is None else []
    going = [i for i in going if len(sequences[i].tokens) < model.context_length]
    if steps.can_follow(len(going)) and cache.available_pages() >= len(going):
        with cache.ahead([handles[i] for i in going], steps.finish) as arguments:
            steps.follow([rows[i] for i in going], [choices[i] for i in going], arguments)
        found = steps.wait()
        for row, i in enumerate(going):
            sequences[i]._row, sequences[i]._promised = row, found[rows[i]]
    else:
        found = steps.finish()
    return [steps.told(row, found[row], c) for row, c in zip(rows, choices, strict=True)]


def common_prefix(left: list[int], right: list[int]) -> int:
    """Return how many tokens two lists begin with alike."""
    count = 0
    for mine, theirs in zip(left, right, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
