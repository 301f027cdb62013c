"""The output items of a response as they grow, and the events that tell of it.

Each event shows its item as it is at that moment: encode it before the next one is asked for.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from amx_tvm.server.tools import Delta

Event = dict[str, Any]


class _Item:
    """An item of the output, ``item``, at its place in the list."""

    def __init__(self, place: int, prefix: str, **fields: Any):
        self.item: dict[str, Any] = {"id": f"{prefix}_{uuid.uuid4().hex}", **fields}
        self.item["status"] = "in_progress"
        self._place = place

    def _event(self, name: str, /, **fields: Any) -> Event:
        made = {"type": f"response.{name}", "output_index": self._place, **fields}
        return made if "item" in made else {**made, "item_id": self.item["id"]}

    def begin(self) -> Iterator[Event]:
        yield self._event("output_item.added", item=self.item)

    def end(self, status: str) -> Iterator[Event]:
        self.item["status"] = status
        yield self._event("output_item.done", item=self.item)


class _Text(_Item):
    """A message, or the thinking part: an item with one part of text."""

    _prefix = "msg"
    _fields: dict[str, Any] = {"type": "message", "role": "assistant"}
    _kind = "output_text"

    def __init__(self, place: int, _first: Delta):
        super().__init__(place, self._prefix, **self._fields, content=[])
        self.part = self._empty()

    def _empty(self) -> dict[str, Any]:
        return {"type": self._kind, "text": "", "annotations": [], "logprobs": []}

    def _more(self, logprobs: list[Any]) -> dict[str, Any]:
        return {"logprobs": logprobs}

    def begin(self) -> Iterator[Event]:
        yield from super().begin()
        self.item["content"].append(self.part)
        yield self._event("content_part.added", content_index=0, part=self.part)

    def add(self, delta: Delta, logprobs: list[Any]) -> Iterator[Event]:
        text = delta.text or delta.reasoning
        self.part["text"] += text
        if "logprobs" in self.part:
            self.part["logprobs"] += logprobs
        if text or logprobs:
            more = self._more(logprobs)
            yield self._event(f"{self._kind}.delta", content_index=0, delta=text, **more)

    def end(self, status: str) -> Iterator[Event]:
        text, more = self.part["text"], self._more(self.part.get("logprobs", []))
        yield self._event(f"{self._kind}.done", content_index=0, text=text, **more)
        yield self._event("content_part.done", content_index=0, part=self.part)
        yield from super().end(status)


class _Thought(_Text):
    """The thinking part."""

    _prefix = "rs"
    _fields = {"type": "reasoning", "summary": []}
    _kind = "reasoning_text"

    def _empty(self) -> dict[str, Any]:
        return {"type": self._kind, "text": ""}

    def _more(self, logprobs: list[Any]) -> dict[str, Any]:
        return {}


class _Call(_Item):
    """A call of a function."""

    def __init__(self, place: int, delta: Delta):
        fields = {"call_id": delta.id, "name": delta.name, "arguments": ""}
        super().__init__(place, "fc", type="function_call", **fields)

    def add(self, delta: Delta, logprobs: list[Any]) -> Iterator[Event]:
        self.item["arguments"] += delta.arguments
        if delta.arguments:
            yield self._event("function_call_arguments.delta", delta=delta.arguments)

    def end(self, status: str) -> Iterator[Event]:
        made = {"name": self.item["name"], "arguments": self.item["arguments"]}
        yield self._event("function_call_arguments.done", **made)
        yield from super().end(status)


class Output:
    """The output of one response.

    Attributes
    ----------
    items : list of dict
        OpenAI's output items, the last one under way.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._current: _Text | _Call | None = None

    def add(self, delta: Delta, logprobs: list[Any]) -> Iterator[Event]:
        """Add what came, and yield what it changes; an item ends where another one begins."""
        starts = bool(delta.name)
        kind = _Call if delta.call is not None else _Thought if delta.reasoning else _Text
        if type(self._current) is not kind or starts:
            yield from self.end("completed")
            place = len(self.items)
            self._current = kind(place, delta)
            self.items.append(self._current.item)
            yield from self._current.begin()
        yield from self._current.add(delta, logprobs)

    def end(self, status: str) -> Iterator[Event]:
        """End the item under way, if there is one."""
        if self._current is not None:
            yield from self._current.end(status)
            self._current = None
