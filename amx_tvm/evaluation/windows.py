"""Windows of token ids, and which of their predictions count.

Windows start every `stride` tokens. With stride = window they are independent, and each scores its
window - 1 predictions: the protocol of the quantization papers. With a smaller stride each token is
scored once, with at least window - stride tokens of context:

    window 1    s s s s s s s s          s: scored
    window 2            . . . . s s s s  .: context only
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from amx_tvm.errors import EvaluationError
from amx_tvm.runtime.options import number

_COUNT = number(whole=True, error=EvaluationError)


@dataclass(frozen=True)
class Window:
    """A piece of a text.

    ids : int64 [n]
    first : index of the first token whose prediction counts, 1 or more
    """

    ids: np.ndarray
    first: int


@dataclass(frozen=True)
class Protocol:
    """How a text is cut: window and stride in tokens, and at most `limit` windows (0: all).

    None is the default of each.
    """

    window: int = 2048
    stride: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        for entry in fields(self):
            given = getattr(self, entry.name)
            value = entry.default if given is None else _COUNT(entry.name, given)
            object.__setattr__(self, entry.name, value)
        if self.window < 2 or not 0 <= self.stride <= self.window or self.limit < 0:
            raise EvaluationError(
                f"window {self.window}, stride {self.stride}, limit {self.limit} given; expected a "
                "window of at least 2 tokens, a stride from 1 to the window (0: the window), and a "
                "limit of at least 0 windows"
            )

    @property
    def step(self) -> int:
        """Tokens from one window's start to the next."""
        return self.stride or self.window


def cut(ids: Sequence[int], protocol: Protocol, vocab_size: int | None = None) -> list[Window]:
    """Cut token ids into windows.

    Only whole windows count; what is left over at the end is not scored.

    Raises
    ------
    EvaluationError
        When the text is no list of token ids, is shorter than one window, or has an id outside the
        vocabulary.
    """
    tokens = np.asarray(ids if len(ids) else [], None if len(ids) else np.int64)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise EvaluationError(
            f"the text's token ids are of type {tokens.dtype}, expected integers, or a path"
        )
    tokens = tokens.astype(np.int64)
    if tokens.ndim != 1 or len(tokens) < protocol.window:
        raise EvaluationError(
            f"the text has {tokens.size} tokens, less than one window of {protocol.window}; give "
            "more text or a smaller window"
        )
    if vocab_size is not None and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise EvaluationError(
            f"the text's token ids reach from {tokens.min()} to {tokens.max()}, but the model's "
            f"vocabulary has {vocab_size} entries; use the model's own tokenizer"
        )
    return list(_cut(tokens, protocol))


def _cut(tokens: np.ndarray, protocol: Protocol) -> Iterator[Window]:
    starts = range(0, len(tokens) - protocol.window + 1, protocol.step)
    for count, start in enumerate(starts):
        if protocol.limit and count >= protocol.limit:
            return
        first = 1 if count == 0 else max(1, protocol.window - protocol.step)
        yield Window(tokens[start : start + protocol.window], first)
