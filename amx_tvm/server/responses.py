"""POST /v1/responses, without state: nothing of one request is kept for the next."""

from __future__ import annotations

import bisect
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from amx_tvm.server import tools
from amx_tvm.server.chat import readings_of, spelled
from amx_tvm.server.choices import Asked
from amx_tvm.server.errors import ApiError
from amx_tvm.server.grammar import Form
from amx_tvm.server.news import Piece
from amx_tvm.server.objects import Usage, named_event
from amx_tvm.server.protocol import Generation
from amx_tvm.server.reasoning import CLOSE
from amx_tvm.server.response_output import Event, Output
from amx_tvm.server.response_request import NamedFunction, ResponseRequest


def form_of(body: ResponseRequest) -> Form | None:
    """Return the form that an answer is held to; ApiError 400 where two are asked for."""
    text = body.text_form()
    forced = tools.form_of(body.listened_tools or [], body.chat_tool_choice)
    if text is not None and forced is not None:
        raise ApiError(
            400, "text.format and tool_choice exclude each other; give one of them", "tool_choice"
        )
    return text or forced


class Responding:
    """One request, checked and ready to run.

    Attributes
    ----------
    answer : Answer
        Its one choice.
    """

    def __init__(self, body: ResponseRequest, ids: list[int], asked: Asked):
        limit = "max_output_tokens"
        room = asked.prompts.room(ids, "input", body.max_output_tokens, limit, None)
        options = Generation(temperature=body.temperature, top_p=body.top_p)
        self.answer = asked.answer(options, [ids], [room], body.logprobs)
        self._body, self._prompts = body, asked.prompts
        listened, choice = body.listened_tools, body.chat_tool_choice
        self._reading = readings_of(listened, choice, ids, asked, 1)[0]
        self._output = Output()
        self._tokens: list[int] = []
        self._logprobs: list[Any] = []  # of tokens whose text is held back
        self._object = _echoed(body, asked.model)
        self._count = 0
        self._reason: str | None = None  # why it ended

    async def whole(self) -> dict[str, Any]:
        """Return the response that is not streamed."""
        async for arrived in self.answer.pieces():
            for _, piece in arrived:
                for _ in self._read(piece):
                    pass
        for _ in self._end():
            pass
        return self._object

    async def opening(self) -> bytes:
        """Return what comes before all pieces."""
        names = ("response.created", "response.in_progress")
        return self._joined({"type": name, "response": self._object} for name in names)

    def of(self, _index: int, piece: Piece) -> bytes:
        """Return what a piece says."""
        return self._joined(self._read(piece))

    def closing(self) -> bytes:
        """Return what comes behind the last piece."""
        ending = self._joined(self._end())
        name = f"response.{self._object['status']}"
        return ending + self._encoded({"type": name, "response": self._object})

    def failed(self, error: ApiError) -> bytes:
        """Return the last event of a stream that fails."""
        failure = {"code": "server_error", "message": str(error)}
        self._object |= {"status": "failed", "error": failure, "output": self._output.items}
        return self._encoded({"type": "response.failed", "response": self._object})

    def _encoded(self, event: Event) -> bytes:
        made = named_event(event["type"], {**event, "sequence_number": self._count})
        self._count += 1
        return made

    def _joined(self, events: Iterable[Event]) -> bytes:
        return b"".join(map(self._encoded, events))

    def _end(self) -> Iterator[Event]:
        """Yield what ends the output; behind it the object is complete."""
        status = "incomplete" if self._reason == "length" else "completed"
        yield from self._output.end(status)
        self._object |= {"status": status, "output": self._output.items, "usage": self._usage()}
        if status == "incomplete":
            self._object["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self._object["completed_at"] = int(time.time())

    def _read(self, piece: Piece) -> Iterator[Event]:
        self._tokens += piece.tokens
        spelling = self._prompts.spelling
        self._logprobs += [spelled(entry, spelling) for entry in piece.logprobs]
        for delta in self._reading.deltas(piece):
            held = []
            if delta.text:
                held, self._logprobs = self._logprobs, []
            yield from self._output.add(delta, held)
        self._reason = piece.finish_reason

    def _usage(self) -> dict[str, Any]:
        used: Usage = self.answer.usage
        thought = 0
        if any(item["type"] == "reasoning" for item in self._output.items):
            thought = self._thinking_tokens()
        details = {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0}
        return {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": details,
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": used.prompt_tokens + used.completion_tokens,
        }

    def _thinking_tokens(self) -> int:
        """Return how many tokens there are up to the mark that closes the thinking part."""
        tokenizer, tokens = self._prompts.engine.tokenizer, self._tokens

        def closed(count: int) -> bool:
            return CLOSE in tokenizer.decode(tokens[:count], skip_special_tokens=False)

        return bisect.bisect_left(range(len(tokens)), True, key=closed)


def _echoed(body: ResponseRequest, model: str) -> dict[str, Any]:
    """Return a response's object before anything has come: what was asked for."""
    listed = [
        {"parameters": None, "strict": None, **tool.model_dump(exclude_none=True)}
        for tool in body.tools or []
    ]
    form = body.text.format if body.text is not None else None
    text = form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}
    reasoning = body.reasoning.effort if body.reasoning is not None else None
    choice = body.tool_choice
    named = choice.model_dump() if isinstance(choice, NamedFunction) else None
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning, "summary": None},
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": text},
        "tool_choice": named or choice or "auto",
        "tools": listed,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "metadata": body.metadata or {},
    }
