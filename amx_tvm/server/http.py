"""What all endpoints share: the key, the body, errors, clients that leave, one line in the log."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amx_tvm.server.errors import ApiError
from amx_tvm.server.metrics import Metrics

log = logging.getLogger("amx_tvm.server")
_ID = re.compile(r"[!-~]{1,128}")  # a client's own id of a request
CLIENT_LEFT = 499  # as nginx logs it; nobody reads the response
EVENTS = "text/event-stream"
SEND = "amx_tvm.send"  # where a scope has the way to the client that passes by all middleware

Handler = Callable[[Request], Awaitable[Response]]


class ToWhomever:
    """An application that may send to a client that has left: the next ``receive`` tells of it.

    Where the server ends before it has, it just returns.

    Parameters
    ----------
    app : ASGI application
        Who sends.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; what cannot be sent any more is dropped."""

        async def try_to_send(message: Message) -> None:
            try:
                await send(message)
            except OSError:
                pass
            except RuntimeError as error:  # uvloop's, between the close and the word of it
                if "handler is closed" not in str(error):
                    raise

        scope[SEND] = try_to_send
        try:
            await self._app(scope, receive, try_to_send)
        except asyncio.CancelledError:  # uvicorn's, at the end of its patience
            if scope["type"] == "lifespan":
                raise


async def unless_left(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Return what ``work`` returns, or None, with it cancelled, where the client leaves before."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    gone, task = asyncio.ensure_future(left()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (gone, task):
            one.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)


async def read_body(request: Request, limit: int) -> bytes:
    """Return a request's body; ApiError 413 as soon as it is longer than ``limit`` bytes."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise ApiError(413, f"the request's body is longer than {limit} bytes; send less")
        parts.append(part)
    return b"".join(parts)


class Door:
    """Wraps endpoints: checks the key, turns errors into responses, counts and logs.

    Parameters
    ----------
    keys : frozenset of str
        API keys; none are asked for where it is empty.
    metrics : Metrics
        Where requests are counted.
    """

    def __init__(self, keys: frozenset[str], metrics: Metrics):
        self._keys = [key.encode() for key in keys]
        self._metrics = metrics

    def key_of(self, request: Request) -> str:
        """Return the key that a request carries, "" where none is asked for; ApiError 401."""
        if not self._keys:
            return ""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        fits = [hmac.compare_digest(given.encode("latin-1"), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(fits):
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return given

    def __call__(self, route: str, handler: Handler) -> Handler:
        """Return the handler as the endpoint of a route, under whose name requests are counted."""

        async def endpoint(request: Request) -> Response:
            given = request.headers.get("x-request-id", "")
            request.state.id = given if _ID.fullmatch(given) else uuid.uuid4().hex
            request.state.route = route
            request.state.started = time.perf_counter()
            request.state.note = ""
            try:
                request.state.key = self.key_of(request)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_LEFT)
            except ApiError as error:
                response = error.response()
                request.state.note = f" {error.code or error.param or ''}"
            except Exception:
                log.exception("request %s failed", request.state.id)
                response = ApiError(500, "the server failed; its log says why").response()
            response.headers["x-request-id"] = request.state.id
            if response.media_type != EVENTS:  # a stream tells of its end itself
                self.finished(request, response.status_code)
            return response

        return endpoint

    def finished(self, request: Request, status: int) -> None:
        """Count a request, and write its line: no text of it."""
        route = request.state.route
        self._metrics.requests.labels(route, str(status)).inc()
        seconds = time.perf_counter() - request.state.started
        log.info(
            "%s %s %d %.3f s%s id=%s",
            request.method,
            route,
            status,
            seconds,
            request.state.note,
            request.state.id,
        )
