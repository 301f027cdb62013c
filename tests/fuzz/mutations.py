"""Hypothesis strategies: bytes and JSON values, damaged in a few places or in a nasty one."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, -1, 1, 3, 255, 65536, 1 << 31, 1 << 32, 1 << 53, 1 << 63, 1 << 64, 10**30)
FLOATS = (0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"))
TEXTS = (
    "",
    "x",
    "\0",
    "../../x",
    "/etc/passwd",
    "\ud800",
    "💥" * 40,
    "a" * 70_000,
    "(a+)+$",
)
DEEP: Any = 1
for _ in range(70):
    DEEP = [DEEP]
NASTY = (None, True, False, *NUMBERS, *FLOATS, *TEXTS, [], {}, [[]], {"": 1}, [0] * 5000, DEEP)


@st.composite
def damaged_bytes(draw: st.DrawFn, good: bytes, start: int = 0, end: int | None = None) -> bytes:
    """Return the bytes with a few of them, between two places, changed, cut out or doubled."""
    data, end = bytearray(good), len(good) if end is None else end
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(start, max(start, min(end, len(data)) - 1)))
        kind = draw(st.sampled_from(("set", "set", "number", "cut", "double", "end")))
        if kind == "set":
            data[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            width = draw(st.sampled_from((4, 8)))
            number = draw(st.sampled_from(NUMBERS)) % (1 << (8 * width))
            data[place : place + width] = number.to_bytes(width, "little")
        elif kind == "end":
            del data[place:]
        else:
            length = draw(st.integers(1, 64))
            data[place : place + length] = data[place : place + length] * (2 * (kind == "double"))
    return bytes(data)


@st.composite
def damaged_json(draw: st.DrawFn, good: Any) -> Any:
    """Return a JSON value with a few values in it replaced, removed or moved to another place."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return value
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(("nasty", "nasty", "other", "remove", "number", "twice")))
        if kind == "nasty":
            holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        elif kind == "number":
            holder[key] = draw(st.integers(-(1 << 40), 1 << 40) | st.floats())
        elif kind == "other":
            other, name = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(other[name])
        elif kind == "twice" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            del holder[key]
    return value


def _places(value: Any) -> Any:
    """Yield (container, key) of the values inside, of long lists only a few."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, child in items[:40] + items[-10:] if len(items) > 50 else items:
        yield value, key
        if isinstance(child, dict | list):
            yield from _places(child)


def text_of(value: Any) -> bytes:
    """Return the JSON of a value, NaN and lone surrogates included."""
    return json.dumps(value).encode()


@st.composite
def damaged_text(draw: st.DrawFn, good: str, words: tuple[str, ...]) -> str:
    """Return a program with lines removed or doubled, and words of it or of ``words`` put in."""
    lines = good.splitlines()
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(lines) - 1)))
        kind = draw(st.sampled_from(("remove", "double", "word", "word", "repeat")))
        if kind in ("remove", "double"):
            lines[place : place + 1] = lines[place : place + 1] * (2 * (kind == "double"))
        else:
            line = lines[place] if lines else ""
            start, end = sorted(draw(st.tuples(*[st.integers(0, len(line))] * 2)))
            word = draw(st.sampled_from(words) | st.sampled_from(good.split() or [""]))
            times = draw(st.sampled_from((1, 1, 2, 500))) if kind == "repeat" else 1
            lines[place : place + 1] = [line[:start] + word * times + line[end:]]
    return "\n".join(lines)
