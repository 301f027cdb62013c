"""What is asked for, and how what came is read."""

from __future__ import annotations

import json
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.contenders import Load, Served

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
PLAIN = "--no-speculation"  # a step is a token: the engine's generations do not speculate either
WHOLE = {"temperature": 0, "ignore_eos": True}


class Prompts:
    """Random prompts, as token ids or as chats of so many tokens."""

    def __init__(self, artifact: Path):
        tokenizer = json.loads((artifact / "tokenizer.json").read_text())
        self._random = np.random.default_rng(0)
        vocabulary = tokenizer["model"]["vocab"]
        self._words = [w[1:] for w in vocabulary if re.fullmatch("[Ġ▁][a-z]{3,9}", w)]
        self._size = len(vocabulary)

    def ids(self, count: int) -> list[int]:
        """Return token ids."""
        return self._random.integers(100, self._size - 100, count).tolist()

    def chat(self, server: Served, count: int) -> tuple[list[dict[str, str]], list[int]]:
        """Return messages of about so many tokens, and their ids through the model's template."""

        def made(words: list[str]) -> tuple[list[dict[str, str]], list[int]]:
            asked = f"Write a very long story with these words: {', '.join(words)}."
            messages = [{"role": "user", "content": asked}]
            return messages, server.post("/tokenize", {"messages": messages})["tokens"]

        words = self._random.choice(self._words, count // 2).tolist()
        extra = len(made(words)[1]) - count
        return made(words[: len(words) - extra // 2])


def chat_bodies(chats: list[Any], tokens: int) -> list[dict[str, Any]]:
    """Return requests for streams."""
    return [{"messages": m, "max_tokens": tokens, **WHOLE, **STREAM} for m, _ in chats]


def gaps(answer: dict[str, Any], start: float = 0.0, end: float = float("inf")) -> list[float]:
    """Return seconds between one arrival and the next within a span of the whole turn."""
    times = [answer["start"] + t for t in answer["arrivals"]]
    return [b - a for a, b in zip(times, times[1:], strict=False) if start <= a and b <= end]


def checked(found: dict[str, Any]) -> dict[str, Any]:
    """Return what came, or end where an answer failed."""
    for answer in found["answers"]:
        if answer["status"] != 200 or answer["error"]:
            raise SystemExit(f"an answer failed: {answer['status']} {answer['error']}")
    return found


def asked(
    load: Load, server: Served, bodies: list[dict[str, Any]], path: str = COMPLETIONS, **more: Any
) -> dict[str, Any]:
    """Send requests, and return what came, or end where an answer failed."""
    return checked(load.ask({"port": server.port, "path": path, "bodies": bodies, **more}))


def together(
    server: Served, path: str, bodies: list[dict[str, Any]], at_once: int = 16
) -> list[tuple[int, str]]:
    """Return statuses and texts of requests, so many at once, where time does not count."""
    with ThreadPoolExecutor(at_once) as clients:
        return list(clients.map(lambda body: server.answer(path, body), bodies))


def middle(values: list[float]) -> str:
    """Spell a median and its extremes."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"
