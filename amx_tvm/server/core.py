"""The engine's side of the server: the scheduler's crank, on the thread that the engine owns.

The front puts requests in and cancels them by messages; pieces come back by one call into the event
loop a step, whatever the number of streams. Nothing else is shared. With nothing to do the thread
sleeps.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from amx_tvm.runtime import Engine
from amx_tvm.runtime.request import Handle, Request
from amx_tvm.runtime.result import TokenLogprobs
from amx_tvm.runtime.sampler import NothingAllowed
from amx_tvm.runtime.scheduler import Scheduler
from amx_tvm.server.errors import ApiError
from amx_tvm.server.limits import Limits
from amx_tvm.server.masks import Ahead, Mask
from amx_tvm.server.pace import Pace
from amx_tvm.server.scoring import Score, Scoring

Deliver = Callable[[int, "Piece"], None]


@dataclass(slots=True)
class Piece:
    """What came for one choice since the last time; it belongs to whoever has it.

    Attributes
    ----------
    text : str
        Text that is certain now; may be empty.
    tokens : list of int
        The tokens that were chosen, also those whose text is held back.
    logprobs : list of TokenLogprobs
        One a token, where they are asked for.
    finish_reason : str or None
        With the last piece: "stop", "length", "cancelled" or "error".
    error : ApiError or None
        With "error": what the client is told.
    cached_tokens : int
        With the last piece: how much of the prompt another sequence had computed.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: ApiError | None = None
    cached_tokens: int = 0

    def add(self, later: Piece) -> None:
        """Append the next one."""
        self.text += later.text
        self.tokens += later.tokens
        self.logprobs += later.logprobs
        self.finish_reason, self.error = later.finish_reason, later.error
        self.cached_tokens = later.cached_tokens


class Core:
    """Requests on an engine. Its methods belong to the event loop's thread.

    Parameters
    ----------
    engine : Engine
        The model; nobody else should use it meanwhile.
    limits : Limits
        How much may wait.
    died : callable
        Called in the event loop, with the exception, should a step break the scheduler itself.
    """

    def __init__(self, engine: Engine, limits: Limits, died: Callable[[Exception], None]):
        self.places = max(1, engine.max_sequences - limits.kept)
        self.error: Exception | None = None
        self.draining = False
        self._limits, self._died = limits, died
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._deliver: dict[int, tuple[int, Deliver]] = {}
        self._waiting: dict[int, int] = {}  # request -> prompt tokens, until its first token
        self._crank = _Crank(engine, self.places, self._post)

    @property
    def running(self) -> int:
        """Requests that have their first token and have not ended."""
        return len(self._deliver) - len(self._waiting)

    @property
    def waiting(self) -> int:
        """Requests without their first token."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread takes requests."""
        return self.error is None and self._crank.alive

    @property
    def kept(self) -> int:
        """Sequences of ended requests that stay for those that begin like them."""
        return self._crank.kept

    @property
    def pages(self) -> tuple[int, int, int]:
        """Pages of the cache when an answer ended last: all, free, and of kept answers."""
        return self._crank.pages

    def submit(self, requests: Sequence[Request], deliver: Deliver) -> list[int]:
        """Queue the choices of one HTTP request, or none of them.

        Parameters
        ----------
        requests : sequence of Request
            One a choice, as `Engine.request` makes them.
        deliver : callable
            Called in the event loop with the request's index in ``requests`` and a piece.

        Returns
        -------
        list of int
            Their numbers, for `cancel`.

        Raises
        ------
        ApiError
            429 where too much waits already, 503 where none are taken any more.
        """
        self.check_room(len(requests), sum(len(one.prompt) for one in requests))
        numbers = [next(self._numbers) for _ in requests]
        for index, (number, one) in enumerate(zip(numbers, requests, strict=True)):
            self._deliver[number] = (index, deliver)
            self._waiting[number] = len(one.prompt)
        self._crank.add(dict(zip(numbers, requests, strict=True)))
        return numbers

    def check_room(self, answers: int = 1, tokens: int = 1) -> None:
        """Raise what `submit` does where so many answers of so many prompt tokens have no room.

        A request that surely has none is turned away before its body is read.
        """
        if self.draining or not self.alive:
            what = "is ending" if self.draining else "has failed"
            raise ApiError(
                503, f"this server {what}; ask another one", headers={"retry-after": "5"}
            )
        limits, waiting = self._limits, len(self._waiting)
        owed = sum(self._waiting.values())
        if waiting and (
            waiting + answers > limits.queue + self.places or owed + tokens > limits.queue_tokens
        ):
            raise ApiError(
                429,
                f"{waiting} answers of {owed} prompt tokens wait already, and this server lets "
                f"{limits.queue} of {limits.queue_tokens} tokens wait; try again later",
                code="queue_full",
                headers={"retry-after": "1"},
            )

    def score(self, prompt: list[int], count: int) -> asyncio.Future[list[TokenLogprobs]]:
        """Return log-probabilities of a prompt's tokens from the second on, some time.

        Parameters
        ----------
        prompt : list of int
            Token ids, checked.
        count : int
            How many most likely tokens are told beside each.
        """
        future: asyncio.Future[list[TokenLogprobs]] = self._loop.create_future()

        def arrived(found: list[TokenLogprobs] | Exception) -> None:
            if future.done():
                return
            if isinstance(found, Exception):
                future.set_exception(ApiError(500, f"this prompt could not be scored: {found}"))
            else:
                future.set_result(found)

        def done(found: list[TokenLogprobs] | Exception) -> None:
            self._loop.call_soon_threadsafe(arrived, found)

        self._crank.score(prompt, count, done, future.cancelled)
        return future

    def cancel(self, numbers: Sequence[int]) -> None:
        """End requests; their pages are free at the end of the step under way."""
        for number in numbers:
            self._forget(number)
        self._crank.cancel(numbers)

    def close(self) -> None:
        """End all requests."""
        self.cancel(list(self._deliver))

    def _forget(self, number: int) -> None:
        self._deliver.pop(number, None)
        self._waiting.pop(number, None)

    def _post(self, pieces: dict[int, Piece], error: Exception | None) -> None:
        """Hand a step's pieces to the event loop; called on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._arrived, pieces, error)
        except RuntimeError:  # the loop has ended, and with it everybody who waits
            pass

    def _arrived(self, pieces: dict[int, Piece], error: Exception | None) -> None:
        for number, piece in pieces.items():
            known = self._deliver.get(number)
            if known is None:  # cancelled meanwhile
                continue
            self._waiting.pop(number, None)
            if piece.finish_reason is not None:
                self._forget(number)
            known[1](known[0], piece)
        if error is not None:
            self.error = error
            lost = Piece(finish_reason="error", error=ApiError(503, "this server has failed"))
            for index, deliver in list(self._deliver.values()):
                deliver(index, lost)
            self._deliver.clear()
            self._waiting.clear()
            self._died(error)


class _Crank:
    """What lives on the engine's thread: the scheduler, and the pieces of the step under way."""

    def __init__(
        self,
        engine: Engine,
        places: int,
        post: Callable[[dict[int, Piece], Exception | None], None],
    ):
        self._worker = engine.worker
        engine.call(lambda: None)  # the thread starts at its first call, and takes posts then
        self._post = post
        self._scheduler: Scheduler = engine.scheduler(places, keep=engine.max_sequences - places)
        self._scheduler.driver = self
        self._scoring = Scoring(engine, self._scheduler)
        self._pace = Pace(self._scheduler)
        self._handles: dict[int, Handle] = {}
        self._pieces: dict[int, Piece] = {}
        self._on_cpu = engine.manifest.target.device == "cpu"
        self._ahead = Ahead(beside=not self._on_cpu)
        self._masked: dict[int, tuple[Mask, list[int]]] = {}  # of requests with a new token
        self.pages = (0, 0, 0)

    @property
    def alive(self) -> bool:
        return self._worker.alive

    @property
    def kept(self) -> int:
        """Sequences of ended requests that are kept."""
        return len(self._scheduler.prefixes)

    @property
    def active(self) -> int:
        """Requests under way, as the worker asks its jobs."""
        return self._scheduler.active

    def add(self, requests: dict[int, Request]) -> None:
        """Start requests soon."""
        self._worker.post(self._add, requests)

    def cancel(self, numbers: Sequence[int]) -> None:
        """End requests soon."""
        self._worker.post(self._cancel, list(numbers))

    def score(
        self,
        prompt: list[int],
        count: int,
        done: Callable[[list[TokenLogprobs] | Exception], None],
        cancelled: Callable[[], bool],
    ) -> None:
        """Score a prompt soon, beside everything else."""

        def begin() -> None:
            self._scoring.add(Score(prompt, count, done, cancelled))
            self._worker.attach(self._scoring)

        self._worker.post(begin)

    def step(self) -> bool:
        """Run a step of the scheduler and post what it made."""
        more = self._pace.step()
        if self._masked:
            self._ahead.begin(self._masked.values())
            self._masked.clear()
        self._flush()
        return more

    def fail(self, error: Exception) -> None:
        """End everything: a step broke the scheduler itself."""
        self._flush(error)

    def _flush(self, error: Exception | None = None) -> None:
        if self._pieces or error is not None:
            pieces, self._pieces = self._pieces, {}
            if any(piece.finish_reason is not None for piece in pieces.values()):
                self.pages = self._scheduler.pages
            self._post(pieces, error)

    def _add(self, requests: dict[int, Request]) -> None:
        for number, request in requests.items():
            try:
                self._handles[number] = self._scheduler.add(self._with_callbacks(number, request))
            except Exception as error:
                self._end(number, "error", ApiError(400, str(error)))
        self._flush()
        self._worker.attach(self)

    def _cancel(self, numbers: list[int]) -> None:
        for number in numbers:
            handle = self._handles.pop(number, None)
            if handle is not None:
                self._scheduler.cancel(handle)
            self._pieces.pop(number, None)
            self._masked.pop(number, None)
        self.pages = self._scheduler.pages

    def _with_callbacks(self, number: int, request: Request) -> Request:
        """Return a request with callbacks that collect its pieces."""
        wants = request.sampling.logprobs is not None
        mask = request.mask if isinstance(request.mask, Mask) else None
        if self._on_cpu and request.sampling.likeliest:
            mask = None  # it is asked for when the most likely token is not allowed

        def tokens(new: list[int]) -> None:
            piece = self._piece(number)
            piece.tokens += new
            if mask is not None:
                self._masked[number] = mask, self._handles[number].result.token_ids
            if wants:
                piece.logprobs += self._handles[number].result.logprobs[-len(new) :]

        def text(new: str) -> None:
            self._piece(number).text += new

        def ended(result: Any) -> None:
            cached = len(request.prompt) - result.timings.prefill_tokens
            self._piece(number).cached_tokens = max(cached, 0)
            self._end(number, result.finish_reason)

        def failed(error: Exception) -> None:
            if isinstance(error, NothingAllowed):
                error = ApiError(
                    400,
                    "the answer's form allows no token here: min_tokens or ignore_eos asks for "
                    "more than the form does; leave it out",
                    "ignore_eos" if request.limits.ignore_eos else "min_tokens",
                )
            elif not isinstance(error, ApiError):  # a form that fails says how itself
                error = ApiError(500, f"this answer failed: {error}")
            self._end(number, "error", error)

        return replace(request, on_tokens=tokens, on_text=text, on_finish=ended, on_error=failed)

    def _piece(self, number: int) -> Piece:
        """Return the piece of a request that this step makes."""
        found = self._pieces.get(number)
        if found is None:
            found = self._pieces[number] = Piece()
        return found

    def _end(self, number: int, reason: str, error: ApiError | None = None) -> None:
        piece = self._piece(number)
        piece.finish_reason, piece.error = reason, error
        self._handles.pop(number, None)
        self._masked.pop(number, None)
