"""Answers held to many schemas: each is compiled or refused, and what ends by "stop" is valid."""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema

from benchmarks.serving.contenders import ours
from benchmarks.serving.prompts import CHAT, Prompts, together

_TOKENS = 120
_TYPES: list[dict[str, Any]] = [
    {"type": "string", "maxLength": 12},
    {"type": "string", "pattern": "^[a-z]{2,5}-[0-9]{1,3}$"},
    {"type": "string", "format": "date"},
    {"type": "integer", "minimum": -3, "maximum": 400},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "boolean"},
    {"enum": ["red", "grün", "青", 7, None]},
    {"const": {"a": [1, 2]}},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
]


def written() -> list[Any]:
    """Return schemas of our own: every type alone, in arrays, in objects and behind references."""
    made: list[Any] = list(_TYPES)
    for one in _TYPES:
        made += [
            {"type": "array", "items": one, "minItems": 1, "maxItems": 3},
            {"type": "array", "prefixItems": [one, {"type": "null"}], "items": False},
            {"type": "object", "properties": {"x": one}, "required": ["x"]},
            {"type": "object", "properties": {"x": one, "y": one}, "additionalProperties": False},
            {"$defs": {"one": one}, "type": "array", "items": {"$ref": "#/$defs/one"}},
        ]
    tree = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "below": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
        },
        "required": ["name"],
    }
    return [*made, tree]


def found(paths: list[Path]) -> list[Any]:
    """Return the schemas of files and folders.

    A file holds one schema, or a list of groups that have one each, as JSON Schema's own test
    suite has them.
    """
    made: list[Any] = []
    for path in paths:
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            content = json.loads(file.read_text())
            if isinstance(content, list):
                made += [g["schema"] for g in content if isinstance(g, dict) and "schema" in g]
            else:
                made.append(content)
    return made


def schemas(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Hold an answer to each schema, sixteen at once."""
    asked = [*written(), *found(args.schemas)]
    with ours(args.artifact, 16, args.threads) as server:
        told = together(server, CHAT, [_body(schema, i) for i, schema in enumerate(asked)])
    outcomes: Counter[str] = Counter()
    wrong = []
    for schema, (status, text) in zip(asked, told, strict=True):
        outcome = _outcome(schema, status, text)
        outcomes[outcome] += 1
        if outcome not in ("valid", "length", "refused"):
            wrong.append({"schema": schema, "outcome": outcome, "status": status, "text": text})
    print(f"{len(asked)} schemas: {dict(outcomes)}", flush=True)
    for one in wrong:
        print(f"  {one['outcome']}: {json.dumps(one['schema'])[:300]}: {one['text'][:300]}")
    return {"schemas": len(asked), "outcomes": outcomes, "wrong": wrong}


def _body(schema: Any, seed: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Answer with some JSON."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": schema},
        },
        "max_tokens": _TOKENS,
        "seed": seed,
    }


def _outcome(schema: Any, status: int, text: str) -> str:
    answer = json.loads(text)
    if status != 200:
        return "refused" if status == 400 and answer["error"]["message"] else f"status {status}"
    (choice,) = answer["choices"]
    if choice["finish_reason"] != "stop":
        return str(choice["finish_reason"])
    try:
        value = json.loads(choice["message"]["content"])
    except ValueError:
        return "not JSON"
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    with warnings.catch_warnings(action="ignore"):
        valid = kind(schema, format_checker=kind.FORMAT_CHECKER).is_valid(value)
    return "valid" if valid else "invalid"
