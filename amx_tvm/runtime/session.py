"""Sequences: tokens whose keys and values are in the cache, to be extended, forked, rolled back.

A `Sequence` mirrors in ``tokens`` what the cache holds of it. Text generation, chats that reuse
the conversation so far, and scoring are all written with `append`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.greedy import GreedySteps
from amx_tvm.runtime.kv import KVCache
from amx_tvm.runtime.sampler import BROKEN_LOGITS
from amx_tvm.runtime.vm import VirtualMachine, aligned

FEW = 16  # sequences that an artifact's function ``decode_few`` takes at most


class Model:
    """The compiled functions of a language model, bound to their parameters.

    Parameters
    ----------
    machine : VirtualMachine
        The loaded executable.
    parameters : object
        The parameter tuple on the device.
    vocab_size : int
        Token ids must be below it: the compiled embedding lookup does not check.
    context_length : int
        Longest sequence in tokens.
    chunk : int
        Most tokens in one prefill call.
    functions : sequence of str
        Names of the artifact's functions, where it lists them.
    """

    def __init__(
        self,
        machine: VirtualMachine,
        parameters: Any,
        vocab_size: int,
        context_length: int,
        chunk: int,
        functions: Iterable[str] = (),
    ):
        self._names = frozenset(functions)
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.chunk = chunk
        self._machine = machine
        self._parameters = parameters
        self._functions: dict[str, Any] = {}
        self._steps: dict[int, tuple[Any, np.ndarray]] = {}

    def run(self, name: str, tokens: np.ndarray, state: Any) -> np.ndarray:
        """Call ``name`` on int32 tokens [b, n]; return its result, float32 logits [rows, vocab]."""
        return self._run(name, self._machine.to_device(tokens), state)

    def step(self, tokens: list[int], state: Any) -> np.ndarray:
        """Decode a token of each sequence, ids that are checked; float32 logits [b, vocab].

        Python that runs once a step finds the caches full of weights: every line of it counts.
        """
        count = len(tokens)
        name = "decode" if count == 1 else "decode_batch"
        if 1 < count <= FEW and self.has("decode_few"):
            name = "decode_few"
        if not self._machine.is_cpu:
            return self.run(name, np.array(tokens, np.int32)[:, None], state)
        held = self._steps.get(count)
        if held is None:
            view = aligned(np.zeros((count, 1), np.int32))
            held = self._steps[count] = (self._machine.to_device(view), view.reshape(count))
        held[1][:] = tokens
        return self._run(name, held[0], state)

    def _run(self, name: str, tokens: Any, state: Any) -> np.ndarray:
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._machine.function(name)
        return self._machine.to_host(function(tokens, state, self._parameters))

    @cached_property
    def greedy(self) -> GreedySteps:
        """Steps whose tokens the device chooses."""
        return GreedySteps(self._machine, self._parameters)

    def has(self, name: str) -> bool:
        """Whether the artifact has a function of this name."""
        return name in self._names

    def check_tokens(self, tokens: Iterable[int]) -> np.ndarray:
        """Return token ids as int32 [n]; GenerationError names the first that is out of range."""
        array = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise GenerationError(
                f"token ids have shape {array.shape} and type {array.dtype}, expected a flat list "
                "of integers"
            )
        wrong = np.flatnonzero((array < 0) | (array >= self.vocab_size))
        if wrong.size:
            raise GenerationError(
                f"token id {array[wrong[0]]} at position {wrong[0]} is outside the vocabulary of "
                f"{self.vocab_size}"
            )
        return array.astype(np.int32)

    def check_step(self, tokens: Iterable[int]) -> list[int]:
        """Return token ids as a list; the check of `check_tokens`, quick where they are ints."""
        tokens = list(tokens)
        limit = self.vocab_size
        for token in tokens:
            if type(token) is not int or not 0 <= token < limit:
                return self.check_tokens(tokens).tolist()
        return tokens


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
        return self._run(ids, "prefill")[-1]

    @property
    def chooses(self) -> bool:
        """Whether `choose` is there: the device can take the most likely token itself."""
        return self._model.has("begin_greedy")

    def choose(self, token: int) -> int:
        """Add one token and return the most likely next one; the logits stay on the device.

        The step behind is started too, as if the token returned here came next.
        """
        self._model.check_tokens([token])
        cache, greedy = self._cache, self._model.greedy
        if token != self._promised or not cache.adopt(self.handle):
            self._check_length(1)
            with cache.forward([self.handle], [1]) as state:
                greedy.start(token, state)
        self.tokens.append(token)
        if len(self) < self._model.context_length and cache.available_pages():
            with cache.ahead(self.handle, greedy.finish) as state:
                greedy.follow(state)
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
        return self._run(ids, "score")

    def _check_length(self, count: int) -> None:
        """Raise GenerationError where more tokens exceed the context."""
        limit = self._model.context_length
        if len(self) + count > limit:
            raise GenerationError(
                f"{count} tokens after {len(self)} exceed the context of {limit} tokens; "
                "shorten the prompt, or load with a larger context_length if the model allows it"
            )

    def _run(self, ids: np.ndarray, function: str) -> np.ndarray:
        """Run tokens [n] in chunks; a single token of a prefill is a decode step."""
        self._check_length(ids.size)
        self._cache.check_room([self.handle], [ids.size])
        chunk = self._model.chunk
        rows = []
        for start in range(0, ids.size, chunk):
            part = np.ascontiguousarray(ids[start : start + chunk])
            name = "decode" if function == "prefill" and part.size == 1 else function
            with self._cache.forward([self.handle], [part.size]) as state:
                logits = self._model.run(name, part[None, :], state)
            self.tokens.extend(part.tolist())
            if function == "score":
                rows.append(logits)
        return np.concatenate(rows) if len(rows) > 1 else rows[0] if rows else logits

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
    with first._cache.forward([s.handle for s in sequences], counts) as state:
        logits = first._model.step(ids, state)
    for sequence, token in zip(sequences, ids, strict=True):
        sequence.tokens.append(token)
    return logits
