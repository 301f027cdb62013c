"""A request for a generation, checked, and its progress: tokens, text, and whether to go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from amx_tvm.runtime.choices import RowChoice, mask_words, serves
from amx_tvm.runtime.options import Limits, Sampling
from amx_tvm.runtime.result import GenerationResult, TokenLogprobs
from amx_tvm.runtime.sampler import Sampler, logprobs
from amx_tvm.runtime.stream import Detokenizer, StopFilter

if TYPE_CHECKING:
    from amx_tvm.images import PromptImage
    from amx_tvm.runtime.pictures import Picture, Pictures
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
    images : tuple of PromptImage
        The prompt has the image's token for each of their rows.
    salt : str
        Requests of different salts share no pages.
    adapter : int
        The number of the LoRA adapter that it is answered with, -1 for none.
    mask : callable, optional
        Given the tokens that were chosen so far, returns bool [vocab], which tokens may come next,
        or None for all of them. It may have a method ``take``: given these tokens and one more,
        it goes on with that one where it may come next and returns whether it does. A greedy
        request asks it for the most likely token, which is less work than all that are allowed.
        And ``begin``: given these tokens, it begins with what it will be asked for behind them.
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
    images: tuple[PromptImage, ...] = ()
    salt: str = ""
    adapter: int = -1
    mask: Mask | None = None
    on_tokens: Callable[[list[int]], object] | None = None
    on_text: Callable[[str], object] | None = None
    on_finish: Callable[[GenerationResult], object] | None = None
    on_error: Callable[[Exception], object] | None = None

    @property
    def owner(self) -> str:
        """Whose keys and values may be shared: those of one salt and one adapter."""
        return self.salt if self.adapter < 0 else f"{self.adapter}\0{self.salt}"


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
        tokenizer = request.tokenizer
        self._text = Detokenizer(tokenizer, request.prompt) if tokenizer is not None else None
        self._stops = StopFilter(limits.stop)
        likeliest = request.sampling.likeliest
        self._goes_on = getattr(request.mask, "take", None) if likeliest else None
        self._begin = getattr(request.mask, "begin", None)
        self._looked: int | None = None  # the most likely token where it may be taken, else -1
        self._started = time.perf_counter()

    def on_device(self, clusters: bool) -> bool:
        """Whether a device, with or without clusters, may choose the next token."""
        return serves(self.request.sampling, clusters, self._masked)

    @property
    def _masked(self) -> bool:
        return self.request.mask is not None or len(self.result.token_ids) < self._least

    @cached_property
    def choice(self) -> RowChoice:
        """How a device chooses the request's tokens, by the draws that the host would make."""
        request, made = self.request, self.result.token_ids
        return RowChoice(request.sampling, self._sampler.random, request.prompt, made)

    def mask_words(self, vocab: int) -> np.ndarray | None:
        """Return what may come next as a device takes it, None where all may."""
        allowed, banned = self._allowed() if self._masked else (None, ())
        return None if allowed is None and not banned else mask_words(vocab, allowed, banned)

    def _allowed(self) -> tuple[np.ndarray | None, Collection[int]]:
        """Return which tokens may come next (None: all), and which may not all the same."""
        request, made = self.request, self.result.token_ids
        allowed = request.mask(made) if request.mask is not None else None
        return allowed, request.stop_tokens if len(made) < self._least else ()

    @property
    def left(self) -> int:
        """Most tokens that are still to be chosen."""
        return self._most - len(self.result.token_ids)

    def take(self, logits: np.ndarray) -> str:
        """Choose a token from logits [vocab] and return the text that can be shown now."""
        token = -1
        if self._goes_on is not None:
            token, self._looked = self.look(logits), None
        if token < 0:
            token = self._sampler(logits, *self._allowed())
        if self._logprobs is not None:
            self.result.logprobs.append(logprobs(logits, token, self._logprobs))
        return self._add(token)

    def look(self, logits: np.ndarray) -> int:
        """Return the most likely token where a mask lets it be taken; -1 where all are asked for.

        `take` does so too. Whoever has several requests calls this for all of them first: what
        their masks begin here is done while others take theirs.
        """
        if self._goes_on is None:
            return -1
        if self._looked is None:
            made, token = self.result.token_ids, int(np.argmax(logits))
            fine = len(made) >= self._least and np.isfinite(logits[token])
            self._looked = token if fine and self._goes_on(made, token) else -1
            if self._looked < 0 and self._begin is not None:
                self._begin(made)
        return self._looked

    @property
    def waits(self) -> bool:
        """Whether `look` has begun something."""
        return self._looked == -1

    def accept(self, chosen: int | TokenLogprobs) -> str:
        """Take a token that was chosen elsewhere, and return the text that can be shown now."""
        if isinstance(chosen, TokenLogprobs):
            self.result.logprobs.append(chosen)
            chosen = chosen.token
        self._sampler.note(chosen)
        return self._add(chosen)

    def _add(self, token: int) -> str:
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

    def __init__(self, request: Request, context_length: int, pictures: Pictures | None = None):
        self.request = request
        self.error: Exception | None = None
        self.run = Run(request, context_length)
        self.tokens = list(request.prompt)  # and what was chosen
        self.pictures: list[tuple[Picture, int]] = []  # and where the last row of each is
        if request.images and pictures is not None:
            pictures.place(self)
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
