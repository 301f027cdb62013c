"""Calls of tools in a model's answer: found in its text, or forced by a grammar.

A forced call is the text ``{"name": "NAME", "arguments": ARGUMENTS}`` with ARGUMENTS held to the
tool's schema. Where the model decides, calls are taken from the forms in which models write them:
``<tool_call>{...}</tool_call>`` (Hermes, Qwen, SmolLM), or an answer that is one such object (Llama
3, with ``parameters`` too).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from amx_tvm.runtime.stream import StopFilter
from amx_tvm.server.errors import ApiError
from amx_tvm.server.grammar import Form, embedded

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_HEAD, _MIDDLE = '{"name": "', '", "arguments": '


@dataclass
class Delta:
    """A piece of an answer with tools.

    Attributes
    ----------
    text : str
        Plain text.
    call : int or None
        Which call the rest belongs to.
    name : str
        The tool's name, with a call's first piece.
    arguments : str
        More of its arguments' JSON.
    id : str
        The call's id, with its first piece.
    reasoning : str
        Text of the thinking part; then there is nothing else.
    """

    text: str = ""
    call: int | None = None
    name: str = ""
    arguments: str = ""
    id: str = ""
    reasoning: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return OpenAI's delta."""
        if self.reasoning:
            return {"reasoning_content": self.reasoning}
        if self.call is None:
            return {"content": self.text} if self.text else {}
        made: dict[str, Any] = {"index": self.call, "function": {"arguments": self.arguments}}
        if self.name:
            made |= {"id": self.id, "type": "function"}
            made["function"] = {"name": self.name, "arguments": self.arguments}
        return {"tool_calls": [made]}


@dataclass
class Reader:
    """Reads one answer piece by piece.

    Attributes
    ----------
    forced : bool
        Whether the answer is one forced call.
    """

    forced: bool
    calls: int = 0
    _held: str = ""
    _inside: bool = False
    _bare: bool | None = None  # whether the answer is one bare object; None: not known yet
    _name: str = ""
    _markers: StopFilter = field(default_factory=lambda: StopFilter((_OPEN,)))

    def add(self, text: str, last: bool = False) -> Iterator[Delta]:
        """Take more text, and say what it makes certain."""
        if self.forced:
            yield from self._forced(text, last)
            return
        if self._bare is None:
            self._held += text
            start = self._held.lstrip()
            if not start and not last:
                return
            self._bare = start.startswith("{")
            text, self._held = self._held, ""
        if self._bare:
            self._held += text
            if last:
                yield from self._object(self._held)
            return
        yield from self._marked(text, last)

    def _forced(self, text: str, last: bool) -> Iterator[Delta]:
        self._held += text
        if not self._name:
            name, found, rest = self._held.removeprefix(_HEAD).partition(_MIDDLE)
            if not found:
                return
            self._name, self._held, self.calls = name, rest, 1
            yield Delta(call=0, name=name, id=_new_id())
        more = self._held if not last else self._held.removesuffix("}")
        keep = 0 if last or not more.endswith("}") else 1  # the object's own end may be the last
        shown, self._held = more[: len(more) - keep], more[len(more) - keep :]
        if shown:
            yield Delta(call=0, arguments=shown)

    def _marked(self, text: str, last: bool) -> Iterator[Delta]:
        while True:
            if self._inside:
                self._held += text
                body, found, text = self._held.partition(_CLOSE)
                if not found and not last:
                    return
                self._inside, self._held = False, ""
                yield from self._object(body, _OPEN)
            else:
                whole = text
                shown = self._markers.add(text)
                if self._markers.stopped is None:
                    shown += self._markers.flush() if last else ""
                    if shown:
                        yield Delta(shown)
                    return
                if shown:
                    yield Delta(shown)
                text = whole[whole.find(">", max(0, whole.find(_OPEN))) + 1 :]
                self._markers = StopFilter((_OPEN,))
                self._inside = True
            if not text:
                return

    def _object(self, text: str, before: str = "") -> Iterator[Delta]:
        """Take the text of a call; what is none is text."""
        try:
            made = json.loads(text)
            arguments = made["arguments"] if "arguments" in made else made["parameters"]
            name = made["name"]
        except (ValueError, KeyError, TypeError):
            yield Delta(before + text)
            return
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        yield Delta(call=self.calls, name=str(name), arguments=arguments, id=_new_id())
        self.calls += 1


def check(tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the schemas of tools by name; ApiError 400 where one is malformed."""
    found: dict[str, Any] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        parameters = (function.get("parameters") or {}) if isinstance(function, dict) else None
        named = tool.get("type") == "function" and isinstance(name, str) and name
        if not named or not isinstance(parameters, dict):
            raise ApiError(
                400,
                f'tools[{index}] is {tool!r:.80}, expected {{"type": "function", "function": '
                '{"name": ..., "parameters": ...}}',
                f"tools[{index}]",
            )
        found[str(name)] = parameters or {"type": "object"}
    return found


def form_of(tools: Sequence[dict[str, Any]], choice: str | dict[str, Any] | None) -> Form | None:
    """Return the form that a request's tool_choice forces; None where the model decides.

    Raises
    ------
    ApiError
        400 for a choice that there is not.
    """
    schemas = check(tools)
    if isinstance(choice, dict):
        function = choice.get("function")
        wanted = function.get("name") if isinstance(function, dict) else None
        if not isinstance(wanted, str) or wanted not in schemas:
            raise ApiError(
                400,
                f"tool_choice names {wanted!r}, expected one of {', '.join(schemas) or 'no tool'}",
                "tool_choice",
            )
        schemas = {wanted: schemas[wanted]}
    elif choice in (None, "auto", "none"):
        return None
    elif choice != "required":
        raise ApiError(
            400,
            f"tool_choice is {choice!r}, expected 'none', 'auto', 'required' or a function",
            "tool_choice",
        )
    if not schemas:
        raise ApiError(400, "tool_choice needs tools, there are none", "tool_choice")
    rules = [
        f"call{i}: {json.dumps(_HEAD + name + _MIDDLE)} arguments{i} {json.dumps('}')}\n"
        f"arguments{i}: %json {json.dumps(embedded(schema))}"
        for i, (name, schema) in enumerate(schemas.items())
    ]
    start = " | ".join(f"call{i}" for i in range(len(schemas)))
    return Form("grammar", f"start: {start}\n" + "\n".join(rules), "tools")


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
