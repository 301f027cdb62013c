"""Strict mode: one text, cold and warm, alone and among sixteen, with drafts and without."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from benchmarks.serving.contenders import ours
from benchmarks.serving.prompts import CHAT, PLAIN, Prompts, together

_TOKENS = 64
_SYSTEMS = (
    "You are a helpful assistant who answers briefly and who says so where something is unknown.",
    "You tell stories for children. Every story has a beginning, a middle and an end, and nobody "
    "in it is ever hurt. Use short sentences and plain words.",
)
_TASKS = (
    "Write about {}.",
    "Say this three times, word by word: the old {} stood by the river, and the river was wide, "
    "and the old {} stood by the river, and the river was wide.",
)
_WORDS = "mill fox bridge clock garden ship baker tower".split()


def same(args: argparse.Namespace, _: Prompts) -> dict[str, Any]:
    """Compare the texts of one set of requests in every company.

    Prompts share beginnings, so that ended answers are of use to the next ones; half of them ask
    for a text that repeats itself, so that drafts are made; half are greedy, the others have a
    seed.
    """
    manifest = json.loads((args.artifact / "manifest.json").read_text())
    if any("float32" not in one["rows"].values() for one in manifest["linears"]):
        raise SystemExit(f"{args.artifact} was not compiled with --strict: nothing to compare")
    bodies = list(_bodies())
    texts: dict[str, list[str]] = {}
    counted: dict[str, dict[str, int]] = {}
    for drafts, options in (("plain", (PLAIN,)), ("drafting", ())):
        for company, at_once in (("alone", 1), ("among 16", 16)):
            with ours(args.artifact, 16, args.threads, *options) as server:
                for heat in ("cold", "warm"):
                    told = [json.loads(t) for _, t in together(server, CHAT, bodies, at_once)]
                    name = f"{drafts}, {company}, {heat}"
                    texts[name] = [one["choices"][0]["message"]["content"] for one in told]
                    details = [one["usage"]["prompt_tokens_details"] for one in told]
                    counted[name] = {
                        "cached": sum(one["cached_tokens"] for one in details),
                        "drafted": int(server.metrics().get("amx_tvm_drafted_tokens_total", 0)),
                    }
    first = texts["plain, alone, cold"]
    row = {}
    for name, made in texts.items():
        differing = [i for i, (a, b) in enumerate(zip(first, made, strict=True)) if a != b]
        greedy = sum("seed" not in bodies[i] for i in differing)
        row[name] = {"greedy": greedy, "seeded": len(differing) - greedy, **counted[name]}
        print(f"{name}: of {len(first)} texts differ {row[name]}", flush=True)
    return row


def _bodies() -> Iterator[dict[str, Any]]:
    for i, word in enumerate(_WORDS * 4):
        task = _TASKS[i % 2].format(word, word) + " Begin now." * (i // 8)
        messages = [
            {"role": "system", "content": _SYSTEMS[i // 4 % 2]},
            {"role": "user", "content": task},
        ]
        chosen = {"temperature": 0.8, "seed": i} if i // 2 % 2 else {"temperature": 0}
        yield {"messages": messages, "max_tokens": _TOKENS, "ignore_eos": True, **chosen}
