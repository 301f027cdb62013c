"""What a tokenizer of others may do to a text: steps that find nothing or grow without end.

The library follows whatever tokenizer.json says: forty replacements of "a" by "aa" make 2^40 times
the text, and an empty pattern is found everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypedDict

from tokenizers import Tokenizer

from amx_tvm.errors import ModelError
from amx_tvm.schema import Mismatch, Range, conform
from amx_tvm.strict_json import parse_json, read_text

MOST_BYTES = 48 << 20  # of tokenizer.json; the largest published ones have 35 MB
MOST_GROWTH = 256  # of a text by all replacements together
MOST_STEPS = 64
# The library makes a table up to the largest id, and ends the process where memory is short.
Id = Annotated[int, Range(0, (1 << 24) - 1)]


class _Added(TypedDict):
    id: Id


class _Model(TypedDict, total=False):
    vocab: dict[str, Id] | list[Any]  # a list for Unigram


class _Tokenizer(TypedDict, total=False):
    model: _Model
    added_tokens: list[_Added]


def load_tokenizer(path: Any) -> Tokenizer:
    """Read tokenizer.json.

    Raises
    ------
    ModelError
        When the library cannot read it, or its steps are beyond the limits above.
    """
    text = read_text(path, ModelError, MOST_BYTES)
    value = parse_json(text, path, ModelError)
    try:
        conform(_Tokenizer, {k: v for k, v in value.items() if v} if type(value) is dict else value)
    except Mismatch as problem:
        raise ModelError(f"{path} is no tokenizer that can be read: {problem}") from None
    tokenizer = guarded(
        lambda: Tokenizer.from_str(text), f"{path} is no tokenizer that can be read"
    )
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    for part in filter(None, parts):
        growth, steps = 1.0, list(_steps(json.loads(part.__getstate__())))
        for step in steps:
            if step.get("type") not in ("Replace", "Split"):
                continue
            wanted = step.get("pattern", {})
            pattern = wanted.get("String", wanted.get("Regex"))
            if not pattern:
                raise ModelError(
                    f"{path} has a {step['type']} of an empty text, which is everywhere"
                )
            shortest = len(pattern) if "String" in wanted else 1
            growth *= max(1.0, len(step.get("content") or "") / shortest)
        if growth > MOST_GROWTH or len(steps) > MOST_STEPS:
            raise ModelError(
                f"{path} has {len(steps)} steps that may make {growth:.3g} times a text's length; "
                f"at most {MOST_STEPS} and {MOST_GROWTH} are followed"
            )
    return tokenizer


def guarded(action: Callable[[], Any], what: str) -> Any:
    """Return what the library returns; its errors, panics included, become a ModelError."""
    try:
        return action()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and panics above them
        raise ModelError(f"{what}: {' '.join(str(error).split())}") from None


def _steps(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [part.get(key) for key in ("normalizers", "pretokenizers", "decoders")]
    inner = next((steps for steps in lists if steps is not None), None)
    if inner is None:
        yield part
        return
    for step in inner:
        yield from _steps(step)
