"""The server's routes, and its start and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from amx_tvm.images import PromptImage
from amx_tvm.runtime import Engine
from amx_tvm.runtime.budget import kv_bytes
from amx_tvm.server.answer import Answer
from amx_tvm.server.chat import Chat
from amx_tvm.server.chat import form_of as chat_form
from amx_tvm.server.choices import Asked
from amx_tvm.server.choices import form_of as common_form
from amx_tvm.server.completions import Completion
from amx_tvm.server.core import Core, Drive, beside
from amx_tvm.server.errors import ApiError, ServerError
from amx_tvm.server.grammar import Form, Forms
from amx_tvm.server.http import CLIENT_LEFT, unless_left
from amx_tvm.server.prompts import Prompts
from amx_tvm.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)
from amx_tvm.server.response_request import ResponseRequest
from amx_tvm.server.responses import Responding
from amx_tvm.server.responses import form_of as response_form
from amx_tvm.server.service import Service, Settings
from amx_tvm.server.stream import EventStream

__all__ = ["Server", "Settings"]

_WATCH_S = 1.0
_PAGES = {  # as `State.pages` has them
    "amx_tvm_pages": "Pages of the cache when an answer ended last",
    "amx_tvm_pages_free": "Those of them that were free",
    "amx_tvm_pages_kept": "Pages of kept answers; what several share counts for each",
}
_DRAFTS = {  # and these counters, as `State` has them
    "amx_tvm_drafted_tokens": ("drafted", "Tokens that were guessed"),
    "amx_tvm_accepted_tokens": ("accepted", "Guesses that were right"),
    "amx_tvm_drafted_steps": ("drafted_steps", "Steps with guesses"),
}
_PAGE = Path(__file__).parent / "page" / "index.html"


class Server(Service):
    """An engine behind HTTP; ``app`` is its ASGI application.

    Parameters
    ----------
    engine : Engine
        The model. The server alone uses it.
    settings : Settings
        Names, keys and limits.
    died : callable
        Called with the exception when the core can't go on; the process should end.
    drive : callable, optional
        Starts what drives the engine, by default on its thread of this process.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        died: Callable[[BaseException], None],
        drive: Drive | None = None,
    ) -> None:
        posts = {
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chat,
            "/v1/responses": self._responses,
            "/v1/embeddings": self._embeddings,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }
        self._engine, self._died = engine, died
        own = (settings.name, *settings.aliases)
        if taken := sorted(set(own) & set(engine.adapters)):
            raise ServerError(
                f"{taken[0]!r} names the model and one of its adapters; serve the model by another "
                "name (--name)"
            )
        super().__init__(settings, posts, self._lifespan, Route("/", self._page))
        self._drive = drive or beside(engine, settings.limits.kept)
        self._prompts = Prompts(engine, settings.images)
        self._forms = Forms(engine)
        self._core: Core | None = None

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        limits = self.settings.limits
        core = Core(max(1, self._engine.max_sequences - limits.kept), limits, self._died)
        await core.start(self._drive)
        self._core = core
        watch = self.metrics.watch
        watch("amx_tvm_running", "Answers under way", lambda: core.running)
        watch("amx_tvm_waiting", "Answers that wait for their first token", lambda: core.waiting)
        watch("amx_tvm_kept", "Ended answers kept for prompts like them", lambda: core.state.kept)
        for index, (name, text) in enumerate(_PAGES.items()):
            watch(name, text, partial(_page_count, core, index))
        manifest = self._engine.manifest
        page, token = float(manifest.kv_cache["page_size"]), float(kv_bytes(manifest))
        watch("amx_tvm_page_tokens", "Tokens of a page", lambda: page)
        watch("amx_tvm_token_bytes", "Bytes of a token in the cache", lambda: token)
        watch("amx_tvm_places", "Answers that may be under way at once", lambda: core.places)
        if self._engine.speculation is not None:
            for name, (told, text) in _DRAFTS.items():
                self.metrics.count(name, text, partial(_of_state, core, told))
        watching = asyncio.ensure_future(self._watch(core))
        yield
        watching.cancel()
        core.draining = True
        core.close()

    async def _watch(self, core: Core) -> None:
        """Notice an engine's thread that is gone, whatever ended it."""
        while core.alive:
            await asyncio.sleep(_WATCH_S)
        if core.error is None:
            self._died(ServerError("the engine's thread has ended; load the artifact again"))

    @property
    def core(self) -> Core:
        """The core; there is one while the application runs."""
        assert self._core is not None
        return self._core

    def drain(self) -> None:
        """Refuse what is new from now on; what is under way goes on."""
        if self._core is not None:
            self._core.draining = True

    def end(self) -> None:
        """End what is under way with an error."""
        if self._core is not None:
            self._core.end()

    @property
    def known(self) -> tuple[str, ...]:
        """What requests may call the model: its names, and those of its adapters."""
        return (*super().known, *self._engine.adapters)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and answer."""
        return self._engine.context_length

    @property
    def state(self) -> str:
        """What /health says."""
        core = self._core
        if core is None or core.draining:
            return "ending"
        return "ok" if core.alive else "failed"

    @property
    def idle(self) -> bool:
        """Whether no answer is under way."""
        return self._core is None or not self._core.running + self._core.waiting

    async def _completions(self, request: Request) -> Response:
        self.core.check_room()
        body = parse(CompletionRequest, await self.body_of(request))
        self.check_model(body.model)
        ids = await self._prompts.of_completion(body.prompt)
        made = Completion(body, ids, await self._asked(request, body.model, common_form(body)))
        return await self._answered(request, made.answer, bool(body.stream), made)

    async def _chat(self, request: Request) -> Response:
        self.core.check_room()
        body = parse(ChatRequest, await self.body_of(request))
        self.check_model(body.model)
        form = chat_form(body)
        tools = None if body.tool_choice == "none" else body.tools
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        ids, images = await self._prompts.of_chat(body.messages, tools, variables=variables)
        made = Chat(body, ids, await self._asked(request, body.model, form, images))
        return await self._answered(request, made.answer, bool(body.stream), made)

    async def _responses(self, request: Request) -> Response:
        self.core.check_room()
        body = parse(ResponseRequest, await self.body_of(request))
        self.check_model(body.model)
        tools = None if body.tool_choice == "none" else body.listened_tools
        variables = {}
        if body.reasoning is not None and body.reasoning.effort is not None:
            variables["reasoning_effort"] = body.reasoning.effort
        ids, _ = await self._prompts.of_chat(
            body.messages(), tools, variables=variables, param="input"
        )
        made = Responding(body, ids, await self._asked(request, body.model, response_form(body)))
        return await self._answered(request, made.answer, bool(body.stream), made)

    async def _asked(
        self,
        request: Request,
        model: str | None,
        form: Form | None,
        images: tuple[PromptImage, ...] = (),
    ) -> Asked:
        matcher = None if form is None else await self._forms.compile(form)
        adapter = model if model in self._engine.adapters else None
        name, key = adapter or self.settings.name, request.state.key
        return Asked(self._prompts, self.core, name, key, matcher, images, adapter)

    async def _answered(
        self, request: Request, answer: Answer, stream: bool, made: Chat | Completion | Responding
    ) -> Response:
        """Run a request that was checked: as a stream, or as one response."""
        answer.start(self.settings.limits.timeout_s)

        def finished(status: int) -> None:
            answer.cancel()  # if anything of it still runs
            request.state.note = answer.note
            self.metrics.record(answer)
            if stream:
                self.door.finished(request, status)

        if stream:
            return EventStream(made, finished)
        try:
            found = await unless_left(request.receive, made.whole())
        except ApiError as error:
            finished(error.status)
            raise
        finished(200 if found is not None else CLIENT_LEFT)
        return Response(status_code=CLIENT_LEFT) if found is None else JSONResponse(found)

    async def _embeddings(self, _request: Request) -> Response:
        raise ApiError(
            404,
            f"{self.settings.name} generates text and gives no embeddings; ask a server whose "
            "model does",
            "model",
            "model_not_found",
        )

    async def _tokenize(self, request: Request) -> Response:
        body = parse(TokenizeRequest, await self.body_of(request))
        self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give prompt or messages, one of them", "prompt")
        if body.messages is not None:
            ids, _ = await self._prompts.of_chat(
                body.messages,
                body.tools,
                body.add_generation_prompt,
                body.chat_template_kwargs,
                fits=False,
            )
        else:
            ids = await self._prompts.encode(body.prompt or "", "prompt") if body.prompt else []
        count = {"count": len(ids), "max_model_len": self._prompts.context}
        return JSONResponse({"tokens": ids, **count})

    async def _detokenize(self, request: Request) -> Response:
        body = parse(DetokenizeRequest, await self.body_of(request))
        self.check_model(body.model)
        ids = self._prompts.checked(body.tokens, "tokens") if body.tokens else []
        return JSONResponse({"prompt": self._prompts.decode(ids)})

    async def _page(self, _request: Request) -> Response:
        return FileResponse(_PAGE)


def _page_count(core: Core, index: int) -> int:
    return core.state.pages[index]


def _of_state(core: Core, name: str) -> int:
    return int(getattr(core.state, name))
