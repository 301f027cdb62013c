"""A request for a generation, checked, and its progress: tokens, text, and whether to go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from amx_tvm.runtime.choices import RowChoice
from amx_tvm.runtime.options import Limits, Sampling
from amx_tvm.runtime.result import GenerationResult
from amx_tvm.runtime.sampler import Sampler, logprobs
from amx_tvm.runtime.stream import Detokenizer, StopFilter

if TYPE_CHECKING:
    from amx_tvm.runtime.session import Sequence

Mask = Callable[[list[int]], np.ndarray | None]


@dataclass(frozen=True, eq=False)
class Request:
    """What `Scheduler.add` takes; `Engine.request` makes one of a prompt and options.

    Attributes
    ----------
    prompt : list of int
        Token ids, checked; at least one.
    sampling : Sampling
        How tokens are chosen.
    limits : Limits
        When it ends.
    stop_tokens : frozenset of int
        Every token that ends it.
    stream : int
        Requests with the same seed draw from different streams.
    tokenizer : tokenizers.Tokenizer, optional
        Turns tokens into text; without it there is none.
    sequence : Sequence, optional
        Work on this sequence and keep it; by default one that ends with the request.
    salt : str
        Requests of different salts share no pages.
    mask : callable, optional
        Given the tokens that were chosen so far, returns bool [vocab], which tokens may come next,
        or None for all of them.
    on_tokens, on_text, on_finish, on_error : callable, optional
        Called on the engine's thread: with the list of new tokens of a step; with text that is
        certain; with the GenerationResult; with the exception that ended it. Each request ends
        with one call of the last two. They should be quick: everything waits for them.
    """

    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    stop_tokens: frozenset[int] = frozenset()
    stream: int = 0
    tokenizer: Any = None
    sequence: Sequence | None = None
    salt: str = ""
    mask: Mask | None = None
    on_tokens: Callable[[list[int]], object] | None = None
    on_text: Callable[[str], object] | None = None
    on_finish: Callable[[GenerationResult], object] | None = None
    on_error: Callable[[Exception], object] | None = None


class Run:
    """The state of one request apart from the cache: sampler, detokenizer, stops, result.

    Parameters
    ----------
    request : Request
        What was asked for.
    context_length : int
        Longest sequence in tokens; the last token that is chosen need not fit.
    """

    def __init__(self, request: Request, context_length: int):
        self.request = request
        self.result = GenerationResult()
        self.finished = False
        limits = request.limits
        self._most = min(limits.max_new_tokens, context_length - len(request.prompt) + 1)
        self._least = limits.min_tokens
        self._sampler = Sampler(request.sampling, request.prompt, request.stream)
        self._logprobs = request.sampling.logprobs
        self._plain = replace(request.sampling, temperature=0.0).greedy
        tokenizer = request.tokenizer
        self._text = Detokenizer(tokenizer, request.prompt) if tokenizer is not None else None
        self._stops = StopFilter(limits.stop)
        self._started = time.perf_counter()

    @property
    def on_device(self) -> bool:
        """Whether a device may choose the next token: nothing changes the logits or notes them."""
        return (
            self._plain and self.request.mask is None and len(self.result.token_ids) >= self._least
        )

    @cached_property
    def choice(self) -> RowChoice:
        """How a device chooses the request's tokens, by the draws that the host would make."""
        return RowChoice(self.request.sampling, self._sampler.random)

    @property
    def left(self) -> int:
        """Most tokens that are still to be chosen."""
        return self._most - len(self.result.token_ids)

    def take(self, logits: np.ndarray) -> str:
        """Choose a token from logits [vocab] and return the text that can be shown now."""
        request, made = self.request, self.result.token_ids
        allowed = request.mask(made) if request.mask is not None else None
        banned = request.stop_tokens if len(made) < self._least else ()
        token = self._sampler(logits, allowed, banned)
        if self._logprobs is not None:
            self.result.logprobs.append(logprobs(logits, token, self._logprobs))
        return self.accept(token)

    def accept(self, token: int) -> str:
        """Take a token that was chosen, and return the text that can be shown now."""
        result = self.result
        result.token_ids.append(token)
        piece = ""
        if token in self.request.stop_tokens:
            self.finish("stop", token)
        else:
            if self._text is not None:
                piece = self._stops.add(self._text.add(token))
            if self._stops.stopped is not None:
                self.finish("stop", self._stops.stopped)
            elif len(result.token_ids) >= self._most:
                self.finish("length")
        if self.finished:
            piece += self.rest()
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

    def rest(self) -> str:
        """Return the text that was held back, once no more tokens come."""
        if self._stops.stopped is not None:
            return ""
        piece = self._stops.add(self._text.flush()) if self._text is not None else ""
        if self._stops.stopped is None:
            return piece + self._stops.flush()
        self.finish("stop", self._stops.stopped)  # the last, broken characters completed one
        return piece

    def finish(self, reason: str, stopped_by: str | int | None = None) -> None:
        """Note why it ended."""
        self.finished = True
        self.result.finish_reason = reason
        self.result.stopped_by = stopped_by


class Handle:
    """A request under way.

    Attributes
    ----------
    request : Request
        What was asked for.
    error : Exception or None
        What ended it, where something went wrong.
    """

    def __init__(self, request: Request, context_length: int):
        self.request = request
        self.error: Exception | None = None
        self.run = Run(request, context_length)
        self.tokens = list(request.prompt)  # and what was chosen
        self.sequence: Any = None  # the Sequence, while it is under way
        self.draft: Any = None  # the Draft of what comes next, where there is speculation

    @property
    def result(self) -> GenerationResult:
        """What was generated so far; complete once `finished`."""
        return self.run.result

    @property
    def finished(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.run.finished
