"""The compiled functions of a language model, and the one step that everything is written with.

`Model.forward` runs any mix of sequences: a token of each, chunks of prompts, rows to be scored.
It alone knows which functions an artifact has and which of them serves a step best.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.greedy import GreedySteps
from amx_tvm.runtime.kv import KVCache
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
        Most rows in one call of `forward` that is not a token of each sequence.
    functions : sequence of str
        Names of the artifact's functions, where it lists them.
    long_after : int
        Length after which a sequence turns by other rotary frequencies, from its first token on;
        its tokens are then given as -1 - id. 0 for models without such a length.
    """

    def __init__(
        self,
        machine: VirtualMachine,
        parameters: Any,
        vocab_size: int,
        context_length: int,
        chunk: int,
        functions: Iterable[str] = (),
        long_after: int = 0,
    ):
        self.long_after = long_after
        self._names = frozenset(functions)
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.chunk = chunk
        self._machine = machine
        self._parameters = parameters
        self._functions: dict[str, Any] = {}
        self._steps: dict[int, tuple[Any, np.ndarray]] = {}

    def forward(
        self,
        cache: KVCache,
        sequences: Sequence[int],
        lengths: Sequence[int],
        tokens: Sequence[int] | np.ndarray,
        wanted: Sequence[int],
    ) -> np.ndarray:
        """Add tokens to sequences in one step, and return the logits that are wanted.

        Parameters
        ----------
        cache : KVCache
            Where the sequences live.
        sequences : sequence of int
            Their ids in the cache, each once.
        lengths : sequence of int
            How many of the tokens each gets, at least 1; `chunk` at most together, unless each
            gets one.
        tokens : sequence of int or ndarray
            The token ids, checked, those of a sequence in a row.
        wanted : sequence of int
            For each sequence, of how many of its last rows the logits are wanted.

        Returns
        -------
        ndarray
            float32 [sum(wanted), vocab].

        Raises
        ------
        GenerationError
            The cache has not enough free pages. Whatever is raised, the sequences are as before.

        Notes
        -----
        Python that runs once a step finds the caches full of weights: every line of it counts.
        """
        if len(tokens) == len(sequences) == sum(wanted):
            with cache.forward(sequences, lengths) as arguments:
                return self._each(tokens, arguments)
        return self._mixed(cache, sequences, lengths, np.asarray(tokens, np.int32), wanted)

    def _each(self, tokens: Sequence[int] | np.ndarray, arguments: tuple) -> np.ndarray:
        """Run one token of each sequence; float32 logits [b, vocab]."""
        count = len(tokens)
        name = "decode" if count == 1 else "decode_batch"
        if 1 < count <= FEW and "decode_few" in self._names:
            name = "decode_few"
        if not self._machine.is_cpu:
            return self._run(
                name, self._machine.to_device(np.array(tokens, np.int32)[:, None]), arguments
            )
        held = self._steps.get(count)
        if held is None:
            view = aligned(np.zeros((count, 1), np.int32))
            held = self._steps[count] = (self._machine.to_device(view), view.reshape(count))
        held[1][:] = tokens
        return self._run(name, held[0], arguments)

    def _mixed(
        self,
        cache: KVCache,
        sequences: Sequence[int],
        lengths: Sequence[int],
        tokens: np.ndarray,
        wanted: Sequence[int],
    ) -> np.ndarray:
        """Run the sequences one after another; all are as before where one of them fails."""
        rows: list[np.ndarray] = []
        done: list[tuple[int, int]] = []
        start = 0
        try:
            for sequence, length, count in zip(sequences, lengths, wanted, strict=True):
                part = np.ascontiguousarray(tokens[start : start + length])[None, :]
                start += length
                name = "score" if count > 1 else "decode" if length == 1 else "prefill"
                with cache.forward([sequence], [length]) as arguments:
                    logits = self._run(name, self._machine.to_device(part), arguments)
                done.append((sequence, length))
                if count:
                    rows.append(logits[len(logits) - count :])
        except BaseException:
            for sequence, length in done:
                cache.rollback(sequence, length)
            raise
        if not rows:
            return np.zeros((0, self.vocab_size), np.float32)
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    def _run(self, name: str, tokens: Any, arguments: tuple) -> np.ndarray:
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._machine.function(name)
        return self._machine.to_host(function(tokens, *arguments, self._parameters))

    @cached_property
    def greedy(self) -> GreedySteps:
        """Steps whose tokens the device chooses."""
        return GreedySteps(self._machine, self._parameters)

    @property
    def chooses(self) -> bool:
        """Whether the device can take the most likely token itself."""
        return "begin_greedy" in self._names

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
