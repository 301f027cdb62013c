"""OpenAI's forms of a message become what a chat template expects.

A message arrives with ``content`` as text, as a list of parts, or null beside ``tool_calls``, with
``arguments`` as JSON text or as an object, with null in every field that its client left out.
Templates know one or the other; which one, :class:`Expectation` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from amx_tvm.errors import GenerationError

# What OpenAI's two interfaces call a part that is text.
_TEXT_PARTS = ("text", "input_text", "output_text")
# And one that is an image: of this, templates read the type only.
_IMAGE_PARTS = ("image", "image_url", "input_image")
_IMAGE = {"type": "image"}
# The names that a message's reasoning has been given, the one that templates read today first.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# How a message can say that it has no content, what transformers does first.
_NO_CONTENT: tuple[dict[str, Any], ...] = ({}, {"content": None}, {"content": ""})

_WORD, _KEY = "nonesuch", "nosuchkey"
_TOOL = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}

Message = Mapping[str, Any]
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str | None]


@dataclass(frozen=True)
class Expectation:
    """What a chat template takes.

    Attributes
    ----------
    text : bool
        Content as text.
    parts : bool
        Content as a list of parts.
    no_content : dict
        The fields of a message without content: none, null or an empty text.
    object_arguments : bool
        The arguments of a tool call as an object; otherwise as JSON text.
    images : bool
        Parts that are images.
    """

    text: bool = True
    parts: bool = False
    no_content: dict[str, Any] = field(default_factory=dict)
    object_arguments: bool = True
    images: bool = False

    @classmethod
    def of(cls, render: Render) -> Expectation:
        """Try a template; ``render`` returns a conversation's text, None where it refuses."""

        def shows(content: Any) -> bool:
            # A part that is printed as it is was not understood.
            text = render([{"role": "user", "content": content}], None) or ""
            return _WORD in text and _KEY not in text

        said = {"type": "text", "text": _WORD}
        parts = shows([{**said, _KEY: ""}])
        images = parts and shows([_IMAGE, said])
        if images:  # a template that passes them over writes the same without
            seen, plain = ([{"role": "user", "content": c}] for c in ([_IMAGE, said], [said]))
            images = render(seen, None) != render(plain, None)
        # The first way in which a call is shown; else the first that the template does not refuse.
        ways = list(product(_NO_CONTENT, ({"a": 1}, '{"a": 1}')))
        texts = [_try_call(render, *way) for way in ways]
        good = [way for way, text in zip(ways, texts, strict=True) if text is not None]
        shown = [way for way, text in zip(ways, texts, strict=True) if _WORD in (text or "")]
        no_content, arguments = (shown or good or [({"content": ""}, {})])[0]
        return cls(
            text=shows(_WORD) or not parts,
            parts=parts,
            no_content=no_content,
            object_arguments=not isinstance(arguments, str),
            images=images,
        )


def _try_call(render: Render, no_content: dict[str, Any], arguments: Any) -> str | None:
    """Return the text of a conversation with a tool call, None where it is refused or wrong."""
    call = {"name": _WORD, "arguments": arguments}
    answer = {
        "role": "assistant",
        **no_content,
        "tool_calls": [{"id": "call00001", "type": "function", "function": call}],
    }
    text = render([{"role": "user", "content": "a"}, answer], [_TOOL])
    return None if text is None or "None" in text else text


def adapted(messages: Sequence[Message], expects: Expectation) -> list[dict[str, Any]]:
    """Return messages as a template expects them.

    Raises
    ------
    GenerationError
        For a message that is malformed, or that holds something else than text.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise GenerationError(f"the chat is {messages!r}, expected a list of messages")
    names: dict[str, str] = {}
    result = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise GenerationError(
                f"message {index} of the chat is {message!r}; expected a mapping with 'role' "
                "and 'content'"
            )
        # Null is what clients write into fields that they don't use; transformers drops it too.
        kept = _without_null(message)
        if "content" in kept:
            kept["content"] = _content(kept["content"], expects, index)
        elif kept["role"] in ("user", "system"):
            raise GenerationError(f"message {index} of the chat ({kept['role']}) has no 'content'")
        else:
            kept.update(expects.no_content)
        if "tool_calls" in kept:
            kept["tool_calls"] = _calls(kept["tool_calls"], expects, index, names)
        if kept["role"] == "tool" and kept.get("tool_call_id") in names:
            kept.setdefault("name", names[kept["tool_call_id"]])
        reasoning = next((kept[key] for key in _REASONING if key in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        result.append(kept)
    return result


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a request as a list of objects; None where there are none.

    Raises
    ------
    GenerationError
        When they are no list of objects.
    """
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise GenerationError(
            f"tools are {tools!r}; expected a list of objects, each the JSON schema of a function"
        )
    result = [_without_null(tool) for tool in tools]
    for tool in result:
        if isinstance(tool.get("function"), Mapping):
            tool["function"] = _without_null(tool["function"])
    return result or None


def _without_null(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _content(content: Any, expects: Expectation, index: int) -> Any:
    """Return a message's content as text or as parts."""
    if isinstance(content, str):
        if expects.text:
            return content
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise GenerationError(
            f"message {index} of the chat has the content {content!r}; expected a text or a list "
            "of parts"
        )
    if expects.images:
        return [
            dict(_IMAGE) if _is_image(part) else {"type": "text", "text": _text(part, index)}
            for part in content
        ]
    texts = [_text(part, index) for part in content]
    if expects.parts:
        return [{"type": "text", "text": text} for text in texts]
    return "\n".join(texts)  # as llama.cpp and vLLM join them


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _IMAGE_PARTS


def _text(part: Any, index: int) -> str:
    """Return the text of one part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise GenerationError(
            f"message {index} of the chat has a part of type {kind!r}; this model takes text, as "
            '{"type": "text", "text": ...}'
        )
    return text


def _calls(calls: Any, expects: Expectation, index: int, names: dict[str, str]) -> list[Any]:
    """Return a message's tool calls, and note their functions' names by the calls' ids."""
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise GenerationError(
            f"message {index} of the chat has the tool_calls {calls!r}; expected a list of objects"
        )
    result = []
    for given in calls:
        call = _without_null(given)
        # Older clients leave out the object around the name and the arguments.
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise GenerationError(
                f"message {index} of the chat calls {function!r}; expected an object with 'name' "
                "and 'arguments'"
            )
        function = _without_null(function)
        function["arguments"] = _arguments(function.get("arguments", {}), expects)
        call = {**call, "function": function} if "function" in call else function
        if isinstance(call.get("id"), str):
            names[call["id"]] = function["name"]
        result.append(call)
    return result


def _arguments(arguments: Any, expects: Expectation) -> Any:
    """Return a call's arguments as an object or as JSON text."""
    if not expects.object_arguments:
        return arguments if isinstance(arguments, str) else json.dumps(arguments)
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except ValueError:
            return arguments  # a model wrote them; its words are kept
        return parsed if isinstance(parsed, dict) else arguments
    return arguments
