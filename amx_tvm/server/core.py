"""The front's side of the engine: who waits for which number, and how much may wait.

Its methods belong to the event loop's thread. The engine's side (`crank`) turns the scheduler on a
thread of this process, or in another one (`apart`); between both go messages only, one into the
event loop a step, whatever the number of streams.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from amx_tvm.runtime import Engine
from amx_tvm.runtime.request import Request
from amx_tvm.runtime.result import TokenLogprobs
from amx_tvm.server.crank import Crank
from amx_tvm.server.errors import ApiError
from amx_tvm.server.limits import Limits
from amx_tvm.server.news import News, Piece, State

Deliver = Callable[[int, Piece], None]


class Driver(Protocol):
    """The engine's side as the front calls it: `Crank`, or who speaks to it."""

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""

    def add(self, requests: dict[int, Request]) -> None:
        """Start requests soon."""

    def score(self, number: int, prompt: list[int], count: int, adapter: str | None) -> None:
        """Score a prompt soon."""

    def cancel(self, numbers: Sequence[int]) -> None:
        """End what has these numbers soon."""


Drive = Callable[[Callable[[News], None]], Awaitable[Driver]]  # given whom to tell, in the loop


def beside(engine: Engine, kept: int) -> Drive:
    """Return what drives an engine on its thread of this process; see `Crank`."""

    async def drive(arrived: Callable[[News], None]) -> Driver:
        loop = asyncio.get_running_loop()

        def post(news: News) -> None:
            try:
                loop.call_soon_threadsafe(arrived, news)
            except RuntimeError:  # the loop has ended, and with it everybody who waits
                pass

        return Crank(engine, kept, post)

    return drive


class Core:
    """Requests on an engine.

    Parameters
    ----------
    places : int
        Requests that it runs at once.
    limits : Limits
        How much may wait.
    died : callable
        Called with the exception, should the scheduler itself break.
    """

    def __init__(self, places: int, limits: Limits, died: Callable[[Exception], None]):
        self.places = places
        self.error: Exception | None = None
        self.draining = False
        self.state = State()  # when an answer ended last
        self._limits, self._died = limits, died
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._deliver: dict[int, tuple[int, Deliver]] = {}
        self._waiting: dict[int, int] = {}  # request -> prompt tokens, until its first token
        self._scores: dict[int, asyncio.Future[list[TokenLogprobs]]] = {}
        self._crank: Driver

    async def start(self, drive: Drive) -> None:
        """Begin to take requests."""
        self._crank = await drive(self._arrived)

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
        """Whether the engine takes requests."""
        return self.error is None and self._crank.alive

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

    def score(
        self, prompt: list[int], count: int, adapter: str | None = None
    ) -> asyncio.Future[list[TokenLogprobs]]:
        """Return log-probabilities of a prompt's tokens from the second on, some time.

        Parameters
        ----------
        prompt : list of int
            Token ids, checked.
        count : int
            How many most likely tokens are told beside each.
        adapter : str, optional
            By which LoRA adapter.
        """
        number = next(self._numbers)
        future = self._scores[number] = self._loop.create_future()

        def done(future: asyncio.Future[list[TokenLogprobs]]) -> None:
            if self._scores.pop(number, None) is not None and future.cancelled():
                self._crank.cancel([number])

        future.add_done_callback(done)
        self._crank.score(number, prompt, count, adapter)
        return future

    def cancel(self, numbers: Sequence[int]) -> None:
        """End requests; their pages are free at the end of the step under way."""
        for number in numbers:
            self._forget(number)
        self._crank.cancel(numbers)

    def close(self) -> None:
        """End all requests."""
        self.cancel([*self._deliver, *self._scores])

    def end(self) -> None:
        """End all requests, and tell them why."""
        self._crank.cancel([*self._deliver, *self._scores])
        self._tell(ApiError(503, "this server is ending; ask another one"))

    def _forget(self, number: int) -> None:
        self._deliver.pop(number, None)
        self._waiting.pop(number, None)

    def _arrived(self, news: News) -> None:
        """Hand out what a step made."""
        if news.state is not None:
            self.state = news.state
        for number, piece in news.pieces.items():
            known = self._deliver.get(number)
            if known is None:  # cancelled meanwhile
                continue
            self._waiting.pop(number, None)
            if piece.finish_reason is not None:
                self._forget(number)
            known[1](known[0], piece)
        for number, found in news.scores.items():
            future = self._scores.get(number)
            if future is None or future.done():
                continue
            if isinstance(found, Exception):
                future.set_exception(ApiError(500, f"this prompt could not be scored: {found}"))
            else:
                future.set_result(found)
        if news.error is not None and self.error is None:
            self._lost(news.error)

    def _lost(self, error: Exception) -> None:
        """Tell everybody that nothing comes any more."""
        self.error = error
        self._tell(ApiError(503, "this server has failed"))
        self._died(error)

    def _tell(self, failed: ApiError) -> None:
        """End everybody who waits with an error."""
        for index, deliver in list(self._deliver.values()):
            deliver(index, Piece(finish_reason="error", error=failed))
        self._deliver.clear()
        self._waiting.clear()
        for future in list(self._scores.values()):
            if not future.done():
                future.set_exception(failed)
