"""Requests of one batch: who joins, what runs in the next step, who gives way, who has ended.

    with engine.scheduler() as scheduler:
        handle = scheduler.add(engine.request("The capital of France is", temperature=0.7))
        while scheduler.step():
            ...
        print(handle.result.text)

A request is tokens of which a part is in the cache. Steps add the next token of those that lack
one only, and a chunk of those that lack more: a prompt, or everything after a preemption (`Turns`
says which). So prompts are computed beside the decoding of others, in one loop for all of it.

Requests start in their order as soon as a place and free pages for their tokens are there; one
that begins like another under way shares its pages. Where pages run out, the request that started
last gives its own back and computes them again later; one that is alone ends with what it has.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from amx_tvm.errors import GenerationError
from amx_tvm.runtime.choices import BROKEN, NOTHING
from amx_tvm.runtime.kv import KVCache
from amx_tvm.runtime.model import Model
from amx_tvm.runtime.prefixes import Prefixes
from amx_tvm.runtime.request import Handle, Request
from amx_tvm.runtime.result import TokenLogprobs
from amx_tvm.runtime.sampler import BrokenLogits, NothingAllowed
from amx_tvm.runtime.session import Sequence, choose_batch
from amx_tvm.runtime.turns import Turns
from amx_tvm.runtime.worker import Worker, as_error, on_thread

_FAULTS: dict[Any, type[GenerationError]] = {BROKEN: BrokenLogits, NOTHING: NothingAllowed}


class Scheduler:
    """Requests whose steps are shared. Made by `Engine.scheduler`; use it in `with`.

    Its methods run on the engine's thread, and so do the requests' callbacks.

    Parameters
    ----------
    model : Model
        The functions.
    cache : callable
        Returns the KV cache to work in; asked while nothing is under way.
    worker : Worker or None
        The engine's thread.
    max_sequences : int
        Most requests under way.
    prefill_rows : int, optional
        Most tokens of prompts for each step of those that decode; by default as many as it takes.
    prefixes : Prefixes, optional
        Where sequences of ended requests stay, for those that begin like them.

    Attributes
    ----------
    turns : Turns
        What each step adds to whom.
    """

    def __init__(
        self,
        model: Model,
        cache: Callable[[], KVCache],
        worker: Worker | None,
        max_sequences: int,
        prefill_rows: int | None = None,
        prefixes: Prefixes | None = None,
    ):
        self.max_sequences = max_sequences
        self.turns = Turns(model, prefill_rows)
        self.prefixes = Prefixes(0) if prefixes is None else prefixes
        self._model, self._get_cache, self._worker = model, cache, worker
        self.driver: Any = None  # the worker's job that calls `step`, where it is another's
        self._cache: Any = None
        self._waiting: deque[Handle] = deque()
        self._active: list[Handle] = []  # in the order in which they started

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def active(self) -> int:
        """Number of requests under way."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Number of requests that have not started, or gave way."""
        return len(self._waiting)

    @property
    def pages(self) -> tuple[int, int, int]:
        """Pages of the cache: all, free ones, and those of kept sequences (`Prefixes.pages`)."""
        cache = self._cache
        if cache is None:
            return 0, 0, 0
        return cache.pages, cache.available_pages(), self.prefixes.pages(cache.page_size)

    @on_thread
    def add(self, request: Request) -> Handle:
        """Take a request; it starts in one of the next steps.

        Raises
        ------
        GenerationError
            The prompt can never fit into the cache.
        """
        cache = self._cache = self._cache if self._active else self._get_cache()
        if len(request.prompt) > cache.max_tokens:
            raise GenerationError(
                f"the prompt has {len(request.prompt)} tokens, the KV cache holds "
                f"{cache.max_tokens}; shorten it, or load with a larger kv_tokens"
            )
        handle = Handle(request, self._model.context_length, self._model.pictures)
        self._waiting.append(handle)
        return handle

    @on_thread
    def cancel(self, handle: Handle) -> None:
        """End a request; its pages are free when this returns. Nothing where it has ended."""
        if not handle.finished:
            handle.run.finish("cancelled")
            self._end(handle)

    @on_thread
    def close(self) -> None:
        """Cancel everything."""
        for handle in [*self._active, *self._waiting]:
            self.cancel(handle)
        self.prefixes.clear()

    @on_thread
    def fail(self, error: Exception) -> None:
        """End everything with an error."""
        for handle in [*self._active, *self._waiting]:
            self._fail(handle, error)

    @on_thread
    def step(self) -> bool:
        """Run one step and return whether anything is left to do.

        Notes
        -----
        Python that runs once a step finds the caches full of weights: every line of it counts.
        """
        if self._waiting:
            self._admit()
        if not (self._model.chooses and self._end_ahead()):
            parts = self.turns.parts(self._active)
            if self._on_device([handle for handle, _ in parts]):
                self._choose([handle for handle, _ in parts])
            elif parts:
                try:
                    self._forward(parts)
                except Exception as error:
                    self._recover(parts, error)
        return bool(self._active or self._waiting)

    def _forward(self, parts: list[tuple[Handle, int]]) -> None:
        """Run a step and give the requests their logits."""
        sequences, lengths, tokens, wanted, start = [], [], [], [], 0.0
        for handle, count in parts:
            sequence = handle.sequence
            sequences.append(sequence.handle)
            lengths.append(count)
            if count == 1:
                token = handle.tokens[len(sequence.tokens)]
                tokens.append(token)
                wanted.append(1 if len(handle.tokens) == len(sequence.tokens) + 1 else 0)
            else:
                done = len(sequence.tokens)
                tokens += handle.tokens[done : done + count]
                wanted.append(1 if done + count == len(handle.tokens) else 0)
            if not handle.result.token_ids:
                start = start or time.perf_counter()
        given = self._given(parts, tokens) if self._model.long_after else tokens
        look = self._look(sequences, lengths) if self.turns.between is not None else None
        logits = self._model.forward(self._cache, sequences, lengths, given, wanted, look)
        first, asked = 0, list[tuple[Handle, np.ndarray]]()
        for (handle, count), wants in zip(parts, wanted, strict=True):
            handle.sequence.tokens += tokens[first : first + count]
            first += count
            if not handle.result.token_ids:
                timings = handle.result.timings
                timings.prefill_tokens += count
                timings.prefill_s += time.perf_counter() - start
            if wants:
                asked.append((handle, logits[len(asked)]))
                with suppress(Exception):  # taking it raises the same, of this request alone
                    handle.run.look(asked[-1][1])
        for handle, own in sorted(asked, key=lambda one: one[0].run.waits):
            if handle.sequence is not None:  # no callback of this step has cancelled it
                self._take(handle, own)

    @property
    def pauses(self) -> bool:
        """Whether a chunk of prompts lets steps of others run between its kernels."""
        cache = self._cache
        return self._model.pauses and cache is not None and cache.pauses and not cache.adapters

    def _look(self, sequences: list[int], lengths: list[int]) -> Callable[[], None] | None:
        """Return what a chunk of prompts is to call between its kernels."""
        between = self.turns.between
        if between is None or len(sequences) == sum(lengths) or not self.pauses:
            return None

        def step() -> int:
            parts = self.turns.decoding(self._active)
            if not parts or self._lacking(parts):  # nobody gives way: the chunk's pages stay
                return 0
            with self._cache.paused(sequences, lengths):
                try:
                    self._forward(parts)
                except Exception as error:
                    self._recover(parts, error)
            return len(parts)

        return lambda: between(step)

    @staticmethod
    def _given(parts: list[tuple[Handle, int]], tokens: list[int]) -> list[int]:
        """Return a step's token ids as the compiled functions take them."""
        given: list[int] = []
        for handle, count in parts:
            ids = np.array(tokens[len(given) : len(given) + count], np.int32)
            given += handle.sequence.given(ids).tolist()
        return given

    def _end_ahead(self) -> bool:
        """End the step that the device has started already, where there is one."""
        ready = [h for h in self._active if h.sequence.is_ahead and self._on_device([h])]
        if ready:
            self._choose(ready)
            self.turns.last = (len(ready), 0)
        return bool(ready)

    def _on_device(self, handles: list[Handle]) -> bool:
        """Whether these lack a token each, behind which the device can choose the next ones."""
        return 0 < len(handles) <= self._model.chooses and all(
            len(h.tokens) == len(h.sequence.tokens) + 1
            and h.request.adapter < 0
            and h.run.on_device(self._model.clusters)
            for h in handles
        )

    def _choose(self, ready: list[Handle]) -> None:
        """Run a step whose tokens the device chooses; one ahead follows unless prompts wait."""
        sequences = [handle.sequence for handle in ready]
        alone = len(ready) == len(self._active)
        going = [i for i, handle in enumerate(ready) if alone and handle.run.left > 1]
        try:
            last = [handle.tokens[-1] for handle in ready]
            masks = [handle.run.mask_words(self._model.vocab_size) for handle in ready]
            choices = [handle.run.choice for handle in ready]
            tokens = choose_batch(sequences, last, going, choices, masks)
        except Exception as error:
            self._recover([(handle, 1) for handle in ready], error)
            return
        for handle, token in zip(ready, tokens, strict=True):
            if isinstance(token, int) and token in _FAULTS:
                self._fail(handle, _FAULTS[token]())
            elif handle.sequence is not None:  # no callback of this step has cancelled it
                self._take(handle, token)

    def _take(self, handle: Handle, given: np.ndarray | int | TokenLogprobs) -> None:
        """Give a request its logits [vocab], or the token that the device chose."""
        if self._hear(handle, given) and handle.run.finished and handle.sequence is not None:
            self._end(handle)  # a callback may have done so

    def _hear(self, handle: Handle, given: np.ndarray | int | TokenLogprobs) -> bool:
        """Let a request take its next token and tell of it; False where that failed."""
        request, run = handle.request, handle.run
        try:
            piece = run.take(given) if isinstance(given, np.ndarray) else run.accept(given)
            token = run.result.token_ids[-1]
            handle.tokens.append(token)
            if request.on_tokens is not None:
                request.on_tokens([token])
            if piece and request.on_text is not None:
                request.on_text(piece)
        except BaseException as error:
            self._fail(handle, as_error(error))
            return False
        return True

    def _recover(self, parts: list[tuple[Handle, int]], error: Exception) -> None:
        """Deal with a step that failed and left every sequence as it was."""
        if self._lacking(parts):
            self._give_way(error)
        elif len(parts) == 1:
            self._fail(parts[0][0], error)
        else:  # whose fault it is shows when each runs alone
            for part in parts:
                try:
                    self._forward([part])
                except Exception as own:
                    self._fail(part[0], own)

    def _lacking(self, parts: list[tuple[Handle, int]]) -> bool:
        """Whether the free pages do not hold a step."""
        needed = 0
        for handle, count in parts:
            if handle.sequence is not None and handle.sequence.open:
                done = len(handle.sequence)
                needed += self._pages(done + count) - self._pages(done)
        return needed > self._cache.available_tokens() // self._cache.page_size

    def _give_way(self, error: Exception) -> None:
        """Free a kept sequence's pages, or those of the request that started last.

        That request goes on once there are enough.
        """
        if self.prefixes.shed():
            return
        handle = self._active[-1]
        if len(self._active) > 1 or self._others():
            self._release(handle)
            self._waiting.appendleft(handle)
        elif handle.result.token_ids:
            handle.run.finish("length")
            piece = handle.run.rest()
            handle.result.text += piece
            if piece and handle.request.on_text is not None:
                handle.request.on_text(piece)
            self._end(handle)
        else:
            self._fail(handle, error)

    def _others(self) -> bool:
        """Whether pages will become free without the caller's doing."""
        jobs: Any = self._worker.jobs if self._worker is not None else ()
        own = (self, self.driver)
        return any(job not in own and job.active for job in jobs)

    def _admit(self) -> None:
        """Start the requests, in their order, for which there are a place and pages."""
        if not self._active:
            self._cache = self._get_cache()
        while self._waiting and len(self._active) < self.max_sequences:
            handle = self._waiting[0]
            try:
                if not self._start(handle):
                    return
            except Exception as error:
                self._fail(handle, error)

    def _start(self, handle: Handle) -> bool:
        """Give a waiting request a sequence; False where it has to wait."""
        cache, own = self._cache, handle.request.sequence
        parent, shared = (
            (None, 0) if own is not None else self.prefixes.relative(handle, self._active)
        )
        if shared < 0:
            return False
        if own is None:
            while cache.sequences >= cache.max_sequences and self.prefixes.shed(parent):
                pass
        needed = self._pages(len(handle.tokens) + 1) - shared // cache.page_size
        for other in self._active:  # what these are about to need goes first
            needed += self._pages(len(other.tokens) + 1) - self._pages(len(other.sequence))
        while needed > cache.available_tokens() // cache.page_size and self.prefixes.shed(parent):
            pass
        if self._active or self._others():
            if own is None and cache.sequences >= cache.max_sequences:
                return False
            if needed > cache.available_tokens() // cache.page_size:
                return False
        if own is not None:
            own.reserve(cache)
            handle.sequence = own
            own.keep_prefix(handle.tokens)
        elif parent is not None:
            handle.sequence = parent.fork(shared)
        else:
            adapter = handle.request.adapter
            handle.sequence = Sequence(self._model, cache, cache.add(adapter), [], self._worker)
        self._active.append(self._waiting.popleft())
        return True

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._cache.page_size)

    def _release(self, handle: Handle) -> None:
        """Free the pages of a request under way."""
        self._active.remove(handle)
        sequence, handle.sequence = handle.sequence, None
        if sequence is None:
            return
        if handle.request.sequence is None:
            if handle.finished and handle.error is None:
                self.prefixes.keep(sequence, handle.request.owner)
            else:
                sequence.close()
        else:
            sequence.unreserve()
            if not handle.finished:
                sequence.rollback(len(sequence))

    def _end(self, handle: Handle) -> None:
        """Free what an ended request holds and tell its owner."""
        if handle in self._active:
            self._release(handle)
        elif handle in self._waiting:
            self._waiting.remove(handle)
        request, error = handle.request, handle.error
        try:
            if error is None and request.on_finish is not None:
                request.on_finish(handle.result)
            elif error is not None and request.on_error is not None:
                request.on_error(error)
        except BaseException as late:  # of the callback: there is nobody left to tell
            handle.error = as_error(late)

    def _fail(self, handle: Handle, error: Exception) -> None:
        handle.error = error
        handle.run.finish("error")
        self._end(handle)
