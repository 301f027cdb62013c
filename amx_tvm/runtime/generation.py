"""Generations as their callers see them: a stream of pieces, or results once all have ended.

The engine's thread generates, whether or not anybody reads: pieces wait in a queue. A generation
that its owner leaves is cancelled there and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from amx_tvm.runtime.request import Handle, Request
from amx_tvm.runtime.result import GenerationResult
from amx_tvm.runtime.scheduler import Scheduler
from amx_tvm.runtime.worker import Worker

Start = Callable[[Scheduler, list[Request]], list[Handle]]


class TextStream:
    """Iterator over the pieces of text of one generation; ``result`` is complete at its end.

    Nothing is computed, and no sequence taken, before the first piece is asked for. Leaving the
    stream early (`close`, the end of its `with` block, or dropping it) ends the generation.
    """

    def __init__(self, worker: Worker, scheduler: Scheduler, request: Request, start: Start):
        self._worker, self._scheduler, self._start = worker, scheduler, start
        self._pieces: SimpleQueue[Any] = SimpleQueue()  # text, then a result or an exception
        put = self._pieces.put  # not this object: it is to go when its owner leaves it
        self._requests = [replace(request, on_text=put, on_finish=put, on_error=put)]
        self._state = "new"  # "new", "running", "ended"
        self._handle: Handle | None = None
        self._empty = GenerationResult(finish_reason="cancelled")

    @property
    def result(self) -> GenerationResult:
        """What was generated so far."""
        return self._handle.result if self._handle is not None else self._empty

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._state == "ended":
            raise StopIteration
        self._worker.refuse_here()
        if self._requests:
            self._begin()
        piece = self._worker.take(self._pieces)
        if isinstance(piece, str):
            return piece
        self._state = "ended"
        self._pieces.put(None)  # for another thread that waits for a piece
        if isinstance(piece, Exception):
            raise piece
        raise StopIteration

    def _begin(self) -> None:
        """Start the generation, in the one thread that comes first."""
        try:
            request = self._requests.pop()
        except IndexError:
            return
        self._state = "running"
        try:
            [self._handle] = self._worker.call(self._start, self._scheduler, [request])
        except BaseException:
            self.close()
            self._pieces.put(None)
            raise

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; what the generation held is free when this returns."""
        state, self._state = self._state, "ended"
        if state == "running":
            self._scheduler.close()

    def __del__(self) -> None:
        if self._state == "running":
            self._worker.leave(self._scheduler.close)


def complete(
    worker: Worker, scheduler: Scheduler, requests: list[Request], start: Start
) -> list[GenerationResult]:
    """Run requests to their ends and return their results; raise the first error there is."""
    worker.refuse_here()
    ended: SimpleQueue[Any] = SimpleQueue()
    whole = [replace(r, on_finish=ended.put, on_error=ended.put) for r in requests]
    try:
        handles: list[Handle] = worker.call(start, scheduler, whole)
        for _ in handles:
            outcome = worker.take(ended)
            if isinstance(outcome, Exception):
                raise outcome
    except BaseException:
        scheduler.close()
        raise
    return [handle.result for handle in handles]
