"""Every kind of response against OpenAI's published description of its interface."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import referencing
from referencing.jsonschema import DRAFT202012

from benchmarks.serving.contenders import ours
from benchmarks.serving.prompts import CHAT, COMPLETIONS, Prompts, together

RESPONSES = "/v1/responses"
EVENTS = {"stream": True, "stream_options": {"include_usage": True}}
USER = [{"role": "user", "content": "Name a colour."}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"name": "greet", "description": "Greets a person.", "parameters": PERSON}
FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
_ANSWERS = {  # route: what describes an answer, and an event of a stream
    COMPLETIONS: ("CreateCompletionResponse", "CreateCompletionResponse"),
    CHAT: ("CreateChatCompletionResponse", "CreateChatCompletionStreamResponse"),
    RESPONSES: ("Response", "ResponseStreamEvent"),
    "/v1/embeddings": ("CreateEmbeddingResponse", ""),
}


def openapi(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Ask for everything that has an answer of its own shape, and for errors."""
    if args.openapi is None:
        raise SystemExit("--openapi FILE: OpenAI's openapi.json, which is not part of this project")
    described = Described(args.openapi)
    asked = [*_requests(), *_mistakes()]
    with ours(args.artifact, 16, args.threads, "--name", "model") as server:
        for route, schema in (("/v1/models", "ListModelsResponse"), ("/v1/models/model", "Model")):
            described.check(schema, route, json.loads(server.answer(route)[1]))
        for route in {route for route, _ in asked}:
            bodies = [body for other, body in asked if other == route]
            for body, (status, text) in zip(bodies, together(server, route, bodies), strict=True):
                described.answer(route, body, status, text)
    print(
        f"valid: {dict(described.valid)}; but for nulls: {dict(described.nulls)}; not: "
        f"{dict(described.wrong)}",
        flush=True,
    )
    for reason, example in described.examples.items():
        print(f"  {reason}: {example[:400]}")
    counts = {name: getattr(described, name) for name in ("valid", "nulls", "wrong")}
    return counts | {"why": described.examples}


def _requests() -> Iterator[tuple[str, dict[str, Any]]]:
    for stream in ({}, EVENTS):
        for more in (
            {},
            {"prompt": ["a b c", "the red"], "n": 2},
            {"logprobs": 3},
            {"logprobs": 1, "echo": True},
            {"prompt": "Once", "stop": ["e"], "seed": 1},
            {"regex": "[a-c]{3}"},
        ):
            yield COMPLETIONS, {"prompt": "The cat sat", "max_tokens": 8, **more, **stream}
        tools = [{"type": "function", "function": TOOL}]
        named = {"type": "function", "function": {"name": "greet"}}
        for more in (
            {},
            {"n": 2, "stop": "e"},
            {"logprobs": True, "top_logprobs": 3},
            {"response_format": {"type": "json_object"}, "max_tokens": 60},
            {"response_format": FORM, "max_tokens": 60},
            *({"tools": tools, "tool_choice": c} for c in ("none", "auto", "required", named)),
        ):
            yield CHAT, {"messages": USER, "max_tokens": 40, "seed": 3, **more, **stream}
    flat = {"type": "function", **TOOL, "strict": True}
    text = {"format": {"type": "json_schema", "name": "person", "schema": PERSON}}
    for stream in ({}, {"stream": True}):
        for more in (
            {},
            {"input": [{"role": "user", "content": "Name a colour."}], "instructions": "Be brief."},
            {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
            {"text": text, "max_output_tokens": 60},
            *({"tools": [flat], "tool_choice": c} for c in ("none", "auto", "required")),
            {"tools": [flat], "tool_choice": {"type": "function", "name": "greet"}},
        ):
            body = {"input": "Name a colour.", "max_output_tokens": 40, **more, **stream}
            yield RESPONSES, body
    for more in ({}, {"input": ["a", "b"]}, {"encoding_format": "base64"}):
        yield "/v1/embeddings", {"input": "a text", **more}


def _mistakes() -> Iterator[tuple[str, dict[str, Any]]]:
    for route, body in (
        (COMPLETIONS, {"prompt": "a"}),
        (CHAT, {"messages": USER}),
        (RESPONSES, {"input": "a"}),
    ):
        for more in ({"temperature": -1}, {"nonsense": 1}, {"model": "other"}, {"top_p": "x"}):
            yield route, {**body, **more}
        yield route, {}


class Described:
    """The description, and how many objects are as it says.

    Parameters
    ----------
    path : Path
        The document as JSON or YAML.
    """

    def __init__(self, path: Path):
        if path.suffix == ".json":
            document = json.loads(path.read_text())
        else:
            import yaml

            document = yaml.safe_load(path.read_text())
        resource = referencing.Resource(contents=_nullable(document), specification=DRAFT202012)
        self._registry = referencing.Registry().with_resource("openai:", resource)
        self.valid: Counter[str] = Counter()
        self.nulls: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def answer(self, route: str, body: dict[str, Any], status: int, text: str) -> None:
        """Check a whole answer, or each event of a stream."""
        whole, event = _ANSWERS[route]
        if status != 200:
            self.check("ErrorResponse", f"{route} {status}", json.loads(text))
        elif not body.get("stream"):
            self.check(whole, route, json.loads(text))
        else:
            for line in text.splitlines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    self.check(event, f"{route} stream", json.loads(line[6:]))

    def check(self, schema: str, what: str, value: Any) -> None:
        """Count an object, and keep the first one of each kind that is not as described."""
        pointer = {"$ref": f"openai:#/components/schemas/{schema}"}
        validator = jsonschema.Draft202012Validator(pointer, registry=self._registry)
        error = jsonschema.exceptions.best_match(validator.iter_errors(value))
        if error is None:
            self.valid[what] += 1
            return
        if schema == "CreateCompletionResponse" and validator.is_valid(_without_nulls(value)):
            self.nulls[what] += 1
            return
        self.wrong[what] += 1
        where = "/".join("*" if isinstance(step, int) else str(step) for step in error.path)
        self.examples.setdefault(f"{what}, {where}: {error.message[:200]}", json.dumps(value))


def _without_nulls(value: Any) -> Any:
    """Return a completion without the nulls that the description's types do not have.

    A streamed choice that has not ended yet has no reason, as in the description's own example, and
    nothing precedes an echoed prompt's first token.
    """
    made = json.loads(json.dumps(value))
    for choice in made.get("choices", ()):
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        if choice["logprobs"] is not None:
            for name, other in (("token_logprobs", 0.0), ("top_logprobs", {})):
                found = choice["logprobs"][name]
                choice["logprobs"][name] = [other if one is None else one for one in found]
    return made


def _nullable(value: Any) -> Any:
    """Return a document with OpenAPI 3.0's `nullable`, which it still has, said in 3.1's words."""
    if isinstance(value, list):
        return [_nullable(one) for one in value]
    if not isinstance(value, dict):
        return value
    made = {name: _nullable(one) for name, one in value.items()}
    if made.pop("nullable", None) is True:
        return {"anyOf": [made, {"type": "null"}]}
    return made
