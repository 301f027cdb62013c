"""The engine's side of the server: what turns the scheduler's crank, on the engine's thread.

It takes requests by number and posts what each step made of them, in one message. With nothing to
do the thread sleeps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from amx_tvm.errors import AmxError
from amx_tvm.runtime import Engine
from amx_tvm.runtime.request import Handle, Request
from amx_tvm.runtime.sampler import NothingAllowed
from amx_tvm.runtime.scheduler import Scheduler
from amx_tvm.server.errors import ApiError
from amx_tvm.server.masks import Ahead, Mask
from amx_tvm.server.news import News, Piece, Scored, State
from amx_tvm.server.pace import Pace
from amx_tvm.server.scoring import Score, Scoring

_PART = 4  # pieces that are not worth two messages

log = logging.getLogger("amx_tvm.server")


class Crank:
    """Requests on an engine; any thread may call its methods.

    Parameters
    ----------
    engine : Engine
        The model; nobody else should use it meanwhile.
    kept : int
        How many of its sequences are for ended answers.
    post : callable
        Called on the engine's thread with the News of a step.
    """

    def __init__(self, engine: Engine, kept: int, post: Callable[[News], None]):
        self._engine, self._worker = engine, engine.worker
        engine.call(lambda: None)  # the thread starts at its first call, and takes posts then
        self._post = post
        places = max(1, engine.max_sequences - kept)
        self._scheduler: Scheduler = engine.scheduler(places, keep=engine.max_sequences - places)
        self._scheduler.driver = self
        self._scoring = Scoring(engine, self._scheduler)
        self._pace = Pace(self._scheduler, self._tell)
        self._handles: dict[int, Handle] = {}
        self._scores: set[int] = set()  # numbers of prompts that are to be scored
        self._pieces: dict[int, Piece] = {}
        self._part = _PART  # pieces of a message
        self._on_cpu = engine.manifest.target.device == "cpu"
        self._ahead = Ahead(beside=not self._on_cpu)
        self._masked: dict[int, tuple[Mask, list[int]]] = {}  # of requests with a new token

    @property
    def alive(self) -> bool:
        """Whether the engine's thread takes requests."""
        return self._worker.alive

    @property
    def active(self) -> int:
        """Requests under way, as the worker asks its jobs."""
        return self._scheduler.active

    def add(self, requests: dict[int, Request]) -> None:
        """Start requests soon."""
        self._worker.post(self._add, requests)

    def refuse(self, number: int, error: Exception) -> None:
        """End a request soon that could not be made."""
        self._worker.post(self._refuse, number, error)

    def score(self, number: int, prompt: list[int], count: int, adapter: str | None) -> None:
        """Score a prompt soon, beside everything else; see `Core.score`."""
        self._worker.post(self._score, number, prompt, count, adapter)

    def cancel(self, numbers: Sequence[int]) -> None:
        """End what has these numbers soon."""
        self._worker.post(self._cancel, list(numbers))

    def step(self) -> bool:
        """Run a step of the scheduler and post what it made, in two parts where it is much.

        The front works at the first half while the second one's tokens are chosen.
        """
        self._part = max(_PART, (self._scheduler.active + 1) // 2)
        more = self._pace.step()
        self._tell()
        return more

    def _tell(self) -> None:
        """Post what a step made, and begin with the masks of the next one."""
        if self._masked:
            self._ahead.begin(self._masked.values())
            self._masked.clear()
        self._flush()

    def fail(self, error: Exception) -> None:
        """End everything: a step broke the scheduler itself."""
        self._flush(error)

    def _flush(self, error: Exception | None = None) -> None:
        if self._pieces or error is not None:
            pieces, self._pieces = self._pieces, {}
            ended = any(piece.finish_reason is not None for piece in pieces.values())
            self._post(News(pieces, self._state() if ended else None, error=error))

    def _state(self) -> State:
        kept, pages = len(self._scheduler.prefixes), self._scheduler.pages
        made = self._engine.speculation
        if made is None:
            return State(kept, pages)
        return State(kept, pages, made.drafted, made.accepted, made.steps)

    def _add(self, requests: dict[int, Request]) -> None:
        for number, request in requests.items():
            try:
                self._handles[number] = self._scheduler.add(self._with_callbacks(number, request))
            except Exception as error:
                self._end(number, "error", _told(error))
        self._flush()
        self._worker.attach(self)

    def _refuse(self, number: int, error: Exception) -> None:
        self._end(number, "error", _told(error))
        self._flush()

    def _score(self, number: int, prompt: list[int], count: int, adapter: str | None) -> None:
        def done(found: Scored) -> None:
            self._scores.discard(number)
            self._post(News(scores={number: found}))

        self._scores.add(number)
        self._scoring.add(Score(prompt, count, done, lambda: number not in self._scores, adapter))
        self._worker.attach(self._scoring)

    def _cancel(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            handle = self._handles.pop(number, None)
            if handle is not None:
                self._scheduler.cancel(handle)
            self._scores.discard(number)
            self._pieces.pop(number, None)
            self._masked.pop(number, None)
        self._post(News(state=self._state()))

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
            if len(self._pieces) >= self._part:
                self._flush()
            found = self._pieces[number] = Piece()
        return found

    def _end(self, number: int, reason: str, error: ApiError | None = None) -> None:
        piece = self._piece(number)
        piece.finish_reason, piece.error = reason, error
        self._handles.pop(number, None)
        self._masked.pop(number, None)


def _told(error: Exception) -> ApiError:
    """Return what a client is told of a request that could not start: what it can mend is a 400."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AmxError):
        return ApiError(400, str(error))
    log.error("a request could not start", exc_info=error)
    return ApiError(500, "this answer failed: the server's log says why")
