"""A model of embeddings behind HTTP: POST /v1/embeddings, in OpenAI's form."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from amx_tvm.errors import GenerationError
from amx_tvm.runtime import EmbeddingEngine
from amx_tvm.server.errors import ApiError
from amx_tvm.server.http import CLIENT_LEFT, Handler, unless_left
from amx_tvm.server.protocol import EmbeddingRequest, TokenizeRequest, parse
from amx_tvm.server.service import Service, Settings

_AT_ONCE = 64  # texts between which other requests get their turn, and clients that left are seen
_TEXT = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


class EmbeddingServer(Service):
    """An engine of embeddings behind HTTP.

    Parameters
    ----------
    engine : EmbeddingEngine
        The model.
    settings : Settings
        Names, keys and limits.
    """

    def __init__(self, engine: EmbeddingEngine, settings: Settings) -> None:
        posts: dict[str, Handler] = dict.fromkeys(_TEXT, self._no_text)
        posts |= {"/v1/embeddings": self._embeddings, "/tokenize": self._tokenize}
        super().__init__(settings, posts, self._lifespan)
        self._engine = engine
        self._waiting = self._waiting_tokens = self._texts = self._tokens = 0
        self._draining = False

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self.metrics.watch("amx_tvm_waiting", "Requests under way", lambda: self._waiting)
        count = self.metrics.count
        count("amx_tvm_embedded_texts", "Vectors that were made", lambda: self._texts)
        count("amx_tvm_embedded_tokens", "Their tokens", lambda: self._tokens)
        yield
        self._draining = True
        self._engine.close()

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self._engine.settings.max_tokens

    @property
    def state(self) -> str:
        """What /health says."""
        return "ending" if self._draining else "ok"

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return not self._waiting

    def drain(self) -> None:
        """Refuse what is new from now on."""
        self._draining = True

    def end(self) -> None:
        """Let what is under way end: it takes a moment."""
        self.drain()

    async def _embeddings(self, request: Request) -> Response:
        self._check_room()
        body = parse(EmbeddingRequest, await self.body_of(request))
        self.check_model(body.model)
        self._check(body)
        self._waiting += 1
        try:
            work = unless_left(request.receive, self._answer(body))
            found = await asyncio.wait_for(work, self.settings.limits.timeout_s)
        except asyncio.TimeoutError:
            raise ApiError(
                504, f"the request took longer than {self.settings.limits.timeout_s:g} s; send less"
            ) from None
        finally:
            self._waiting -= 1
        return Response(status_code=CLIENT_LEFT) if found is None else JSONResponse(found)

    def _check_room(self) -> None:
        if self._draining:
            raise ApiError(503, "the server is ending", headers={"retry-after": "5"})
        limits = self.settings.limits
        if self._waiting > limits.queue or self._waiting_tokens > limits.queue_tokens:
            raise ApiError(
                429,
                f"{self._waiting} requests of {self._waiting_tokens} tokens wait already; try "
                "again in a moment",
                headers={"retry-after": "1"},
            )

    def _check(self, body: EmbeddingRequest) -> None:
        """Refuse what can be seen before the texts are tokenized."""
        most, prompts = self._engine.dimension, self._engine.settings.prompts
        if body.dimensions is not None and body.dimensions > most:
            raise ApiError(
                400, f"dimensions is {body.dimensions}, the model's are {most}", "dimensions"
            )
        if body.prompt_name is not None and body.prompt_name not in prompts:
            known = ", ".join(map(repr, prompts)) or "none: the model has no prompts"
            text = f"prompt_name is {body.prompt_name!r:.80}, expected one of {known}"
            raise ApiError(400, text, "prompt_name")
        if not body.input:
            raise ApiError(400, "input is empty, expected at least one text", "input")

    async def _answer(self, body: EmbeddingRequest) -> dict[str, Any]:
        given = body.input
        one = isinstance(given, str) or isinstance(given[0], int)
        texts = cast("list[Any]", [given] if one else given)
        try:
            tokens, skipped = await asyncio.to_thread(
                self._engine.encode, texts, body.prompt_name, truncate=bool(body.truncate)
            )
        except GenerationError as error:
            raise ApiError(400, str(error), "input") from None
        total = sum(map(len, tokens))
        self._waiting_tokens += total
        try:
            made: list[np.ndarray] = []
            for first in range(0, len(tokens), _AT_ONCE):
                part = tokens[first : first + _AT_ONCE]
                vectors = self._engine.vectors
                made.extend(await asyncio.to_thread(vectors, part, skipped, body.dimensions))
        finally:
            self._waiting_tokens -= total
        self._texts, self._tokens = self._texts + len(tokens), self._tokens + total
        spell: Any = _base64 if body.encoding_format == "base64" else np.ndarray.tolist
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": spell(vector)}
                for index, vector in enumerate(made)
            ],
            "model": self.settings.name,
            "usage": {"prompt_tokens": total, "total_tokens": total},
        }

    async def _tokenize(self, request: Request) -> Response:
        body = parse(TokenizeRequest, await self.body_of(request))
        self.check_model(body.model)
        if body.prompt is None:
            raise ApiError(400, "a model of embeddings takes prompt, a text", "prompt")
        ids = (await asyncio.to_thread(self._engine.tokenizer.encode, body.prompt)).ids
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.longest})

    async def _no_text(self, _request: Request) -> Response:
        raise ApiError(
            404,
            f"{self.settings.name} makes embeddings (/v1/embeddings) and generates no text; ask a "
            "server whose model does",
            "model",
            "model_not_found",
        )


def _base64(vector: np.ndarray) -> str:
    """Return a vector as OpenAI's clients ask for it: little-endian float32, in base64."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
