"""What every server has, whatever its model does: names, keys, limits, /health, /metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Lifespan

from amx_tvm.server.errors import ApiError
from amx_tvm.server.http import Door, Handler, ToWhomever, read_body
from amx_tvm.server.images import ImageAccess
from amx_tvm.server.limits import Limits
from amx_tvm.server.metrics import Metrics
from amx_tvm.server.openapi import document


@dataclass(frozen=True)
class Settings:
    """How a server presents itself.

    Attributes
    ----------
    name : str
        The model's name in /v1/models and in answers.
    aliases : tuple of str
        More names that requests may use.
    keys : frozenset of str
        API keys; none are asked for where it is empty.
    limits : Limits
        What it takes at most.
    images : ImageAccess
        Where images may come from.
    """

    name: str
    aliases: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
    images: ImageAccess = field(default_factory=ImageAccess)


class Service(ABC):
    """A model behind HTTP; ``app`` is its ASGI application.

    Parameters
    ----------
    settings : Settings
        Names, keys and limits.
    posts : mapping of str to callable
        The routes that take a body.
    lifespan : callable
        What runs around the application.
    more : Route
        Routes that ask for no key.
    """

    def __init__(
        self,
        settings: Settings,
        posts: Mapping[str, Handler],
        lifespan: Lifespan[Starlette] | None = None,
        *more: Route,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.door = door = Door(settings.keys, self.metrics)
        gets = {
            "/v1/models": self._models,
            "/v1/models/{model:path}": self._model,
            "/metrics": self._metrics,
        }
        routes = [
            *(Route(path, door(path, handler)) for path, handler in gets.items()),
            *(Route(path, door(path, one), methods=["POST"]) for path, one in posts.items()),
            Route("/health", self._health),
            Route("/openapi.json", self._openapi),
            *more,
        ]
        handlers = {HTTPException: _as_api_error}
        self.app = ToWhomever(
            Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
        )

    @property
    def known(self) -> tuple[str, ...]:
        """What requests may call the model."""
        return (self.settings.name, *self.settings.aliases)

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens of the longest input."""

    @property
    @abstractmethod
    def state(self) -> str:
        """What /health says: "ok", or why nothing is taken."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether no answer is under way."""

    @abstractmethod
    def drain(self) -> None:
        """Refuse what is new from now on; what is under way goes on."""

    @abstractmethod
    def end(self) -> None:
        """End what is under way with an error."""

    async def body_of(self, request: Request) -> bytes:
        """Return a request's body."""
        return await read_body(request, self.settings.limits.body_bytes)

    def check_model(self, name: str | None) -> None:
        """Refuse a name that the model does not have; ApiError 404."""
        if name is not None and name not in self.known:
            raise ApiError(
                404,
                f"there is no model {name!r} here, expected {' or '.join(map(repr, self.known))}",
                "model",
                "model_not_found",
            )

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about(name) for name in self.known]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        self.check_model(name)
        return JSONResponse(self._about(name))

    def _about(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "amx_tvm",
            "max_model_len": self.longest,
        }

    async def _metrics(self, _request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": self.state}, 200 if self.state == "ok" else 503)

    async def _openapi(self, _request: Request) -> Response:
        return JSONResponse(document())


async def _as_api_error(request: Request, error: Exception) -> Response:
    """Answer unknown routes and methods with the error object too."""
    assert isinstance(error, HTTPException)
    known = {404: "is no route of this server", 405: f"does not take {request.method}"}
    text = f"{request.url.path} {known.get(error.status_code, error.detail)}"
    headers = dict(error.headers or {})
    return ApiError(error.status_code, text, headers=headers).response()
