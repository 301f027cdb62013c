"""What the engine's side tells the front: whole values, which either may keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from amx_tvm.runtime.result import TokenLogprobs
from amx_tvm.server.errors import ApiError

Scored = list[TokenLogprobs] | Exception


@dataclass(slots=True)
class Piece:
    """What came for one choice since the last time; it belongs to whoever has it.

    Attributes
    ----------
    text : str
        Text that is certain now; may be empty.
    tokens : list of int
        The tokens that were chosen, also those whose text is held back.
    logprobs : list of TokenLogprobs
        One a token, where they are asked for.
    finish_reason : str or None
        With the last piece: "stop", "length", "cancelled" or "error".
    error : ApiError or None
        With "error": what the client is told.
    cached_tokens : int
        With the last piece: how much of the prompt another sequence had computed.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: ApiError | None = None
    cached_tokens: int = 0

    def add(self, later: Piece) -> None:
        """Append the next one."""
        self.text += later.text
        self.tokens += later.tokens
        self.logprobs += later.logprobs
        self.finish_reason, self.error = later.finish_reason, later.error
        self.cached_tokens = later.cached_tokens


@dataclass(frozen=True)
class State:
    """Where the engine stands.

    Attributes
    ----------
    kept : int
        Sequences of ended requests that stay for those that begin like them.
    pages : (int, int, int)
        Pages of the cache: all, free, and of kept sequences.
    drafted, accepted, drafted_steps : int
        Tokens that were guessed, those that were right, and steps with guesses.
    """

    kept: int = 0
    pages: tuple[int, int, int] = (0, 0, 0)
    drafted: int = 0
    accepted: int = 0
    drafted_steps: int = 0


@dataclass(slots=True)
class News:
    """What a step made.

    Attributes
    ----------
    pieces : dict
        By requests' numbers.
    state : State or None
        Where an answer ended in it.
    scores : dict
        By numbers too: log-probabilities of a prompt's tokens, or what ended them.
    error : Exception or None
        What broke the scheduler itself: nothing comes behind it.
    """

    pieces: dict[int, Piece] = field(default_factory=dict)
    state: State | None = None
    scores: dict[int, Scored] = field(default_factory=dict)
    error: Exception | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how it is pickled: pieces as tuples, since every step has many."""
        pieces = {
            n: (p.text, p.tokens, p.logprobs, p.finish_reason, p.error, p.cached_tokens)
            for n, p in self.pieces.items()
        }
        return _read, (pieces, self.state, self.scores, self.error)


def _read(pieces: dict[int, tuple[Any, ...]], *rest: Any) -> News:
    return News({n: Piece(*fields) for n, fields in pieces.items()}, *rest)
