"""What a chat's answer says, piece by piece: thoughts, text, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterator

from amx_tvm.server import tools
from amx_tvm.server.news import Piece
from amx_tvm.server.reasoning import Reasoning


class Reading:
    """Reads one choice.

    Parameters
    ----------
    listens : bool
        Whether the answer may call tools.
    forced : bool
        Whether it is one forced call.
    thinks : bool
        Whether it may begin with a thinking part.
    inside : bool
        Whether the prompt ends within that part.
    """

    def __init__(self, listens: bool, forced: bool, thinks: bool, inside: bool):
        self._calls = tools.Reader(forced) if listens else None
        self._thoughts = Reasoning(inside) if thinks else None

    @property
    def is_plain(self) -> bool:
        """Whether all that comes now is text."""
        return self._calls is None and (self._thoughts is None or self._thoughts.over)

    def deltas(self, piece: Piece) -> Iterator[tools.Delta]:
        """Yield what a piece makes certain."""
        text, last = piece.text, piece.finish_reason is not None
        if self._thoughts is not None:
            thought, text = self._thoughts.add(text, last)
            if thought:
                yield tools.Delta(reasoning=thought)
        if self._calls is not None:
            yield from self._calls.add(text, last)
        elif text:
            yield tools.Delta(text)

    def reason(self, piece: Piece) -> str | None:
        """Return why the choice ends, where it does: as OpenAI's chats tell it."""
        called = self._calls is not None and self._calls.calls > 0
        return "tool_calls" if called and piece.finish_reason == "stop" else piece.finish_reason
