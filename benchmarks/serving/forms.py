"""Answers that are held to a schema, beside answers that are not."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.serving.contenders import Load, ours
from benchmarks.serving.prompts import CHAT, PLAIN, Prompts, asked, chat_bodies, middle

STREAMS = 8
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "trade": {"enum": ["farmer", "baker", "smith", "teacher", "sailor"]},
        "friends": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["name", "age", "trade", "friends"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 200}  # more than the tokens hold
FORMAT = {"type": "json_schema", "json_schema": {"name": "people", "schema": PEOPLE}}


def forms(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Tokens/s with a schema over without; all answers have the same length."""
    size = ("--kv-tokens", str(1024 * STREAMS), PLAIN)
    with ours(args.artifact, STREAMS, args.threads, *size) as server, Load() as load:

        def per_s(held: bool) -> float:
            chats = [prompts.chat(server, args.prompt) for _ in range(STREAMS)]
            bodies = chat_bodies(chats, args.tokens)
            if held:
                bodies = [body | {"response_format": FORMAT} for body in bodies]
            found = asked(load, server, bodies, CHAT)
            made = sum(answer["usage"]["completion_tokens"] for answer in found["answers"])
            return made / found["seconds"]

        found: dict[bool, list[float]] = {True: [], False: []}
        for repeat in range(args.repeats + 1):
            for held in (True, False) if repeat % 2 else (False, True):
                value = per_s(held)
                if repeat:
                    found[held].append(value)
    ratios = [a / b for a, b in zip(found[True], found[False], strict=True)]
    print(
        f"{STREAMS} streams held to a schema: {middle(found[True])} tokens/s, "
        f"{middle(ratios)} of without",
        flush=True,
    )
    return {"held": found[True], "free": found[False], "ratios": ratios}
