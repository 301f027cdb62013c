"""OpenAI's response objects: what completions and chats share."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson


@dataclass
class Usage:
    """Token counts of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Envelope:
    """The fields that every object of one answer repeats."""

    kind: str
    model: str
    prefix: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.id or f"{self.prefix}-{uuid.uuid4().hex}"

    def of(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        """Return an object with these choices."""
        made: dict[str, Any] = {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if usage is not None:
            made["usage"] = usage.as_dict()
        return made


_PLACE = uuid.uuid4().hex  # stands for a text, as nothing else does
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once


def event(data: Any) -> bytes:
    """Return one server-sent event of a stream's own objects."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


class TextEvent:
    """An event of which only a text changes: the rest is encoded once.

    Parameters
    ----------
    make : callable
        Returns the event's object for a text.
    """

    def __init__(self, make: Callable[[str], dict[str, Any]]):
        self._head, self._tail = event(make(_PLACE)).split(orjson.dumps(_PLACE))

    def of(self, text: str) -> bytes:
        """Return the event with a text."""
        return self._head + orjson.dumps(text) + self._tail


def named_event(name: str, data: Any) -> bytes:
    """Return one server-sent event that has a name; it may repeat any JSON of the request."""
    return f"event: {name}\ndata: {_encode(data)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
