"""One stream with speculation, beside one without: texts that repeat themselves, and prose."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.serving.contenders import Load, Served, ours
from benchmarks.serving.prompts import CHAT, PLAIN, STREAM, Prompts, asked, middle

CODE = (Path(__file__).parent / "asks.py").read_text().split("def ask(")[0].strip()
JSON = "\n".join(
    f'{{"id": {i}, "name": "{name}", "city": "{city}", "active": true, "balance": {i * 37 % 500}}},'
    for i, (name, city) in enumerate(
        zip(
            "Anna Bela Carl Dora Emil Fritz Greta Hans Ida Jakob".split(),
            "Rome Oslo Bonn Bern Lyon Graz Kiel Linz Nice Pisa".split(),
            strict=True,
        )
    )
)
TASKS = {
    "code with a name changed": (
        f"Rename the class Exchange to Request in this code, and change nothing else. "
        f"Answer with the whole code only.\n\n```python\n{CODE}\n```",
        400,
    ),
    "JSON with a field changed": (
        "Set the city of Carl to Paris in this JSON, and change nothing else. "
        f"Answer with the whole JSON only.\n\n```json\n[\n{JSON}\n]\n```",
        400,
    ),
    "prose": ("Tell me a long story about a fox who learns to swim.", 200),
    "an explanation": ("Explain how rainbows form, and why the sky is blue.", 200),
}


def speculation(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Tokens/s of answers after their first token, with over without; greedy.

    Servers are new each time: answers that they have given before would be copied.
    """
    ratios: dict[str, list[float]] = {name: [] for name in TASKS}
    options = (args.artifact, 1, args.threads)
    for repeat in range(args.repeats):
        with ours(*options) as drafting, ours(*options, PLAIN) as plain, Load() as load:
            for server in (drafting, plain):
                _tokens_per_s(load, server, "Name ten animals.", 64)  # warms up
            for name, (text, most) in TASKS.items():
                found = {}
                for server in (drafting, plain) if repeat % 2 else (plain, drafting):
                    found[server is drafting] = _tokens_per_s(load, server, text, most)
                ratios[name].append(found[True] / found[False])
    for name, values in ratios.items():
        print(f"{name}: {middle(values)} of the tokens/s without speculation", flush=True)
    return ratios


def _tokens_per_s(load: Load, server: Served, text: str, most: int) -> float:
    messages = [{"role": "user", "content": text}]
    body = {"messages": messages, "max_tokens": most, "temperature": 0, **STREAM}
    answer = asked(load, server, [body], CHAT)["answers"][0]
    return (answer["usage"]["completion_tokens"] - 1) / (answer["seconds"] - answer["arrivals"][0])
