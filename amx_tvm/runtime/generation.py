"""One running generation: from logits to the next token, its text, and whether to go on."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.runtime import session
from amx_tvm.runtime.result import GenerationResult
from amx_tvm.runtime.sampler import Sampler, Sampling
from amx_tvm.runtime.stream import Detokenizer, StopFilter


@dataclass(frozen=True)
class Limits:
    """When a generation ends.

    Attributes
    ----------
    max_new_tokens : int
        Most tokens to choose.
    stop : tuple of str
        Strings that end the text; they are not part of it.
    stop_tokens : frozenset of int
        Tokens that end it, the model's EOS among them.
    """

    max_new_tokens: int
    stop: tuple[str, ...]
    stop_tokens: frozenset[int]

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")


class Run:
    """The state of one generation apart from the cache: sampler, detokenizer, stops, result."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        limits: Limits,
        tokenizer: Any,
        context_length: int,
        stream: int = 0,
    ):
        self.prompt = list(prompt)
        self.result = GenerationResult()
        self.finished = False
        self._limits = limits
        self._room = context_length - len(self.prompt)
        self._sampler = Sampler(sampling, self.prompt, stream)
        self._text = Detokenizer(tokenizer, self.prompt) if tokenizer is not None else None
        self._stops = StopFilter(limits.stop)
        self._started = time.perf_counter()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is all that is asked for."""
        return self._sampler.options.greedy

    @property
    def last_token(self) -> int:
        """The token that was chosen last."""
        return self.result.token_ids[-1]

    def prefilled(self, computed: int, seconds: float) -> None:
        """Record what the prompt cost."""
        self.result.timings.prefill_tokens = computed
        self.result.timings.prefill_s = seconds

    def take(self, logits: np.ndarray) -> str:
        """Choose a token from logits [vocab] and return the text that can be shown now."""
        return self.accept(self._sampler(logits))

    def accept(self, token: int) -> str:
        """Take a token that was chosen, and return the text that can be shown now."""
        result = self.result
        result.token_ids.append(token)
        if token in self._limits.stop_tokens:
            self._finish("stop", token)
            piece = ""
        else:
            piece = self._stops.add(self._text.add(token)) if self._text else ""
            if self._stops.stopped is not None:
                self._finish("stop", self._stops.stopped)
            elif len(result.token_ids) >= min(self._limits.max_new_tokens, self._room + 1):
                self._finish("length", None)
        if self.finished and self._stops.stopped is None:
            if self._text:
                piece += self._stops.add(self._text.flush())
            if self._stops.stopped is None:
                piece += self._stops.flush()
            else:  # the last, broken characters completed a stop string
                self._finish("stop", self._stops.stopped)
        result.text += piece
        now = time.perf_counter()
        timings = result.timings
        if len(result.token_ids) == 1:
            timings.first_token_s = now - self._started
            self._decoding = now
        else:
            timings.decode_tokens = len(result.token_ids) - 1
            timings.decode_s = now - self._decoding
        return piece

    def _finish(self, reason: str, stopped_by: str | int | None) -> None:
        self.finished = True
        self.result.finish_reason = reason
        self.result.stopped_by = stopped_by


class TextStream:
    """Iterator over the pieces of text of one generation; ``result`` is complete at its end.

    Closing it early (or leaving its `with` block) frees the sequence that it works on.
    """

    def __init__(self, run: Run, sequence: session.Sequence, owned: bool):
        self._run = run
        self._sequence = sequence
        self._owned = owned
        self._pieces = self._generate()

    @property
    def result(self) -> GenerationResult:
        """What was generated so far."""
        return self._run.result

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()
        self._release()

    def _release(self) -> None:
        if self._owned:
            self._sequence.close()

    def _generate(self) -> Generator[str, None, None]:
        run, sequence = self._run, self._sequence
        try:
            start = time.perf_counter()
            kept = sequence.keep_prefix(run.prompt)
            logits = sequence.append(run.prompt[kept:])
            run.prefilled(len(run.prompt) - kept, time.perf_counter() - start)
            on_device = run.greedy and sequence.chooses
            piece = run.take(logits)
            while True:
                if piece:
                    yield piece
                if run.finished:
                    return
                if on_device:
                    piece = run.accept(sequence.choose(run.last_token))
                else:
                    piece = run.take(sequence.append([run.last_token]))
        finally:
            self._release()


def run_batch(
    runs: list[Run], new_sequence: Any, max_sequences: int, room: Any
) -> list[GenerationResult]:
    """Run several generations together, one decode call for all that are under way.

    Sequences start when a slot and enough free cache pages are there, and leave when they end, so
    short ones do not wait for long ones. A prompt that begins like one under way shares its pages.

    Parameters
    ----------
    runs : list of Run
        The generations, in the order they are started.
    new_sequence : callable
        Returns an empty session.Sequence.
    max_sequences : int
        Most sequences at once.
    room : callable
        ``room(run, active)`` is true if the cache can hold the run to its end beside those under
        way. A run that has the cache for itself is started in any case.
    """
    waiting = list(reversed(runs))
    active: list[tuple[Run, session.Sequence]] = []
    try:
        while waiting or active:
            while (
                waiting
                and len(active) < max_sequences
                and (not active or room(waiting[-1], active))
            ):
                run = waiting.pop()
                sequence = _start(run, active, new_sequence)
                active.append((run, sequence))
                start = time.perf_counter()
                kept = len(sequence)
                logits = sequence.append(run.prompt[kept:])
                run.prefilled(len(run.prompt) - kept, time.perf_counter() - start)
                run.take(logits)
                active = _drop_finished(active)
            if active:
                rows = session.decode_batch(
                    [sequence for _, sequence in active], [run.last_token for run, _ in active]
                )
                for (run, _), logits in zip(active, rows, strict=True):
                    run.take(logits)
                active = _drop_finished(active)
    finally:
        for _, sequence in active:
            sequence.close()
    return [run.result for run in runs]


def _start(run: Run, active: list[tuple[Run, session.Sequence]], new_sequence: Any) -> Any:
    """Return a sequence for a run, forked from the one that shares most of its prompt."""
    best, parent = 0, None
    for _, sequence in active:
        common = 0
        for mine, theirs in zip(run.prompt[:-1], sequence.tokens, strict=False):
            if mine != theirs:
                break
            common += 1
        if common > best:
            best, parent = common, sequence
    return parent.fork(best) if parent is not None else new_sequence()


def _drop_finished(
    active: list[tuple[Run, session.Sequence]],
) -> list[tuple[Run, session.Sequence]]:
    for run, sequence in active:
        if run.finished:
            sequence.close()
    return [(run, sequence) for run, sequence in active if not run.finished]
