"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from amx_tvm.runtime.result import TokenLogprobs
from amx_tvm.server import tools
from amx_tvm.server.choices import Asked
from amx_tvm.server.choices import form_of as common_form
from amx_tvm.server.errors import ApiError
from amx_tvm.server.grammar import Form
from amx_tvm.server.news import Piece
from amx_tvm.server.objects import DONE, Envelope, TextEvent, event
from amx_tvm.server.protocol import ChatRequest
from amx_tvm.server.reading import Reading
from amx_tvm.server.reasoning import OPEN
from amx_tvm.server.spelling import Spelling


def form_of(body: ChatRequest) -> Form | None:
    """Return the form that an answer is held to; ApiError 400 where two are asked for."""
    found = [form for form in (common_form(body), _response_form(body)) if form is not None]
    if body.tools or body.tool_choice not in (None, "auto", "none"):
        forced = tools.form_of(body.tools or [], body.tool_choice)
        found += [forced] if forced is not None else []
    if len(found) > 1:
        names = " and ".join(form.param for form in found)
        raise ApiError(400, f"{names} exclude each other; give one of them", found[1].param)
    return found[0] if found else None


def _response_form(body: ChatRequest) -> Form | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    param = "response_format"
    if wanted.type == "json_object":
        return Form("json_schema", {"type": "object"}, param)
    if wanted.json_schema is None:
        raise ApiError(400, "response_format needs json_schema beside its type", param)
    return Form("json_schema", wanted.json_schema.schema_, param)


class Chat:
    """One request, checked and ready to run.

    Attributes
    ----------
    answer : Answer
        Its choices.
    """

    def __init__(self, body: ChatRequest, ids: list[int], asked: Asked):
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        room = asked.prompts.room(ids, "messages", getattr(body, name), name, None)
        self._body, self._spelling = body, asked.prompts.spelling
        self._model = asked.model
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self.answer = asked.answer(body, [ids], [room], logprobs)
        self._readings = readings_of(body.tools, body.tool_choice, ids, asked, body.n or 1)
        self._chunks = Envelope("chat.completion.chunk", asked.model, "chatcmpl")
        self._so_far = self.answer.usage if body.tells_usage_always else None
        self._texts: dict[int, TextEvent] = {}  # of choices that have begun

    async def whole(self) -> dict[str, Any]:
        """Return the response that is not streamed."""
        choices = [_Whole() for _ in range(self._body.n or 1)]
        async for arrived in self.answer.pieces():
            for index, piece in arrived:
                choice = choices[index]
                for delta in self._readings[index].deltas(piece):
                    choice.add(delta)
                choice.logprobs += [spelled(entry, self._spelling) for entry in piece.logprobs]
                choice.reason = self._readings[index].reason(piece)
        made = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": _listed(choice.logprobs) if self._body.logprobs else None,
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(choices)
        ]
        return Envelope("chat.completion", self._model, "chatcmpl").of(made, self.answer.usage)

    async def opening(self) -> bytes:
        """Return what comes before all pieces: nothing."""
        return b""

    def of(self, index: int, piece: Piece) -> bytes:
        """Return what a piece of a choice says."""
        reading, known = self._readings[index], self._texts.get(index)
        if known and reading.is_plain and self._is_text(piece):
            return known.of(piece.text)
        made = []
        if known is None:
            made.append(event(self._chunk(index, {"role": "assistant", "content": ""}, Piece())))
            self._texts[index] = TextEvent(partial(self._text_chunk, index))
        deltas = list(reading.deltas(piece))
        reason = reading.reason(piece)
        if (piece.logprobs or reason) and not deltas:
            deltas = [tools.Delta()]
        for delta in deltas:
            whose, why = (piece, reason) if delta is deltas[-1] else (Piece(), None)
            made.append(event(self._chunk(index, delta.as_dict(), whose, why)))
        return b"".join(made)

    def _is_text(self, piece: Piece) -> bool:
        """Whether a piece is text and nothing else is to be told with it."""
        more = piece.logprobs or piece.finish_reason or self._so_far
        return bool(piece.text) and not more

    def closing(self) -> bytes:
        """Return what comes behind the last piece."""
        if not self._body.tells_usage:
            return DONE
        return event(self._chunks.of([], self.answer.usage)) + DONE

    def failed(self, error: ApiError) -> bytes:
        """Return the last event of a stream that fails."""
        return event(error.body)

    def _chunk(
        self, index: int, delta: dict[str, Any], piece: Piece, reason: str | None = None
    ) -> dict[str, Any]:
        entries = [spelled(entry, self._spelling) for entry in piece.logprobs]
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _listed(entries) if entries else None,
            "finish_reason": reason,
        }
        made = self._chunks.of([choice], self._so_far)
        return {"usage": None, **made} if self._body.tells_usage else made

    def _text_chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"content": text}, Piece())


def readings_of(
    tools: list[dict[str, Any]] | None,
    choice: str | dict[str, Any] | None,
    ids: list[int],
    asked: Asked,
    count: int,
) -> list[Reading]:
    """Return who reads each of so many choices of a prompt; ``choice`` is its tool_choice."""
    listens = bool(tools) and choice != "none"
    forced = choice not in (None, "auto", "none")
    thinks = asked.matcher is None  # what is held to a form is so from its first token on
    inside = asked.prompts.ends_with(ids, OPEN)
    return [Reading(listens, forced, thinks, inside) for _ in range(count)]


def spelled(entry: TokenLogprobs, spelling: Spelling) -> dict[str, Any]:
    """Return OpenAI's object for a token, its log-probability and the most likely ones."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = list(spelling.data(token))
        return {"token": spelling.text(token), "logprob": logprob, "bytes": data}

    top = [one(token, value) for token, value in entry.top]
    return {**one(entry.token, entry.logprob), "top_logprobs": top}


@dataclass
class _Whole:
    """A choice of a response that is not streamed."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None

    def add(self, delta: tools.Delta) -> None:
        """Add what came."""
        self.text += delta.text
        self.reasoning += delta.reasoning
        if delta.call is None:
            return
        if delta.name:
            function = {"name": delta.name, "arguments": ""}
            self.calls.append({"id": delta.id, "type": "function", "function": function})
        self.calls[delta.call]["function"]["arguments"] += delta.arguments

    def message(self) -> dict[str, Any]:
        """Return OpenAI's message; without text and with calls its content is null."""
        content = None if self.calls and not self.text.strip() else self.text
        made: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            made["reasoning_content"] = self.reasoning
        return {**made, "tool_calls": self.calls} if self.calls else made


def _listed(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"content": entries, "refusal": None}
