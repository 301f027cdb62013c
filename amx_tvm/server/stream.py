"""Server-sent events, written as soon as the engine's pieces arrive.

As long as a client reads as fast as tokens come, an event goes into its connection within the
call that brings a step's pieces into the event loop: no task is woken for it. Where the connection
is full, pieces are joined until it has drained: a reader that lags gets several tokens at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from amx_tvm.server.answer import Answer
from amx_tvm.server.errors import ApiError
from amx_tvm.server.http import CLIENT_LEFT, EVENTS, SEND, unless_left
from amx_tvm.server.news import Piece


class Events(Protocol):
    """What a stream says, as the bytes of server-sent events.

    Attributes
    ----------
    answer : Answer
        Whose pieces they tell of.
    """

    answer: Answer

    async def opening(self) -> bytes:
        """Return what comes before all pieces; perhaps nothing."""

    def of(self, index: int, piece: Piece) -> bytes:
        """Return what a piece of a choice says; perhaps nothing."""

    def closing(self) -> bytes:
        """Return what comes behind the last piece."""

    def failed(self, error: ApiError) -> bytes:
        """Return the last event of a stream that fails."""


class EventStream(Response):
    """A response of events, whose answer is cancelled as soon as the client leaves.

    Parameters
    ----------
    events : Events
        What it says.
    finished : callable
        Called at the end, with the status.
    """

    media_type = EVENTS

    def __init__(self, events: Events, finished: Callable[[int], None]):
        super().__init__()
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._events, self._finished = events, finished
        self._send: Send
        self._rest: Awaitable[None] | None = None  # of an event that was begun and has to wait

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; an error in their middle is the last of them."""
        self._send = scope.get(SEND, send)
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        status = None
        try:
            await send(start)
            status = await unless_left(receive, self._body())
        finally:
            self._finished(status if status is not None else CLIENT_LEFT)
        if status is not None:
            await send({"type": "http.response.body", "body": b""})

    async def _body(self) -> int:
        events = self._events
        try:
            await self._write(await events.opening())
            async for arrived in events.answer.pieces(self._at_once):
                rest, self._rest = self._rest, None
                if rest is not None:
                    await rest
                await self._write(b"".join(events.of(index, piece) for index, piece in arrived))
            await self._write(events.closing())
        except ApiError as error:
            await self._write(events.failed(error))
            return error.status
        return 200

    async def _write(self, data: bytes) -> None:
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def _at_once(self, index: int, piece: Piece) -> bool:
        """Write a piece without waiting; return whether that was all of it.

        Python that runs once a token finds the caches full of weights: every line of it counts.
        """
        try:
            data = self._events.of(index, piece)
            if not data:
                return True
            message = {"type": "http.response.body", "body": data, "more_body": True}
            write: Any = self._send(message)
            waits = write.send(None)
        except StopIteration:
            return True
        except Exception as error:  # the stream's own task is to raise it
            self._rest = _raised(error)
        else:
            self._rest = _Begun(write, waits)
        return False


class _Begun:
    """Awaits the rest of a coroutine that has run up to its first ``await`` that waits."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], waits: Any):
        self._coroutine, self._waits = coroutine, waits

    def __await__(self) -> Generator[Any, Any, None]:
        yield self._waits
        yield from self._coroutine.__await__()


async def _raised(error: Exception) -> None:
    raise error
