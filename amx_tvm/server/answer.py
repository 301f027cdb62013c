"""One request under way: its choices as they grow, for a stream or for one response.

The engine's thread posts pieces a step at a time; whoever reads late gets them joined, so that a
slow reader costs nothing but its own time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from amx_tvm.runtime.request import Request
from amx_tvm.server.core import Core
from amx_tvm.server.errors import ApiError
from amx_tvm.server.news import Piece
from amx_tvm.server.objects import Usage

Pieces = list[tuple[int, Piece]]  # choices, and what came for each
AtOnce = Callable[[int, Piece], bool]


class Answer:
    """The choices of one request.

    Parameters
    ----------
    core : Core
        Where they run.
    requests : sequence of Request
        One a choice, in the order of the choices.

    Attributes
    ----------
    usage : Usage
        Tokens so far.
    reasons : list of str
        Why each choice that has ended did.
    first_token_s : float or None
        Seconds to the first token of any choice.
    gaps : list of float
        Seconds a token, between one arrival and the next.
    """

    def __init__(self, core: Core, requests: Sequence[Request]):
        self._core = core
        self._requests = requests
        self._arrived: dict[int, Piece] = {}
        self._at_once: AtOnce | None = None  # who takes pieces as they come
        self._wake = asyncio.Event()
        self._keys: list[int] = []
        self._running = len(requests)
        self._started = time.perf_counter()
        self._deadline: float | None = None
        self.usage = Usage()
        self.reasons: list[str] = []
        self.first_token_s: float | None = None
        self.gaps: list[float] = []
        self._last = self._started

    @property
    def note(self) -> str:
        """What the log says of it."""
        reasons = " ".join(
            reason if count == 1 else f"{reason}*{count}"
            for reason, count in Counter(self.reasons).items()
        )
        used = self.usage
        return f" prompt={used.prompt_tokens} new={used.completion_tokens} {reasons}"

    @property
    def seconds(self) -> float:
        """Seconds since the request was taken."""
        return time.perf_counter() - self._started

    def start(self, timeout_s: float | None = None) -> None:
        """Put all choices into the queue, or none: ApiError 429 or 503 where there is no room."""
        self._deadline = timeout_s
        self._keys = self._core.submit(self._requests, self._take)

    async def pieces(self, at_once: AtOnce | None = None) -> AsyncIterator[Pieces]:
        """Yield what came for each choice since the last time, until all have ended.

        Parameters
        ----------
        at_once : callable, optional
            Called in the event loop with a choice and its piece, which is not yielded then, where
            nothing that came before is still to be read, and it is not the choice's last one.
            Returns whether it may be called again; otherwise the next list, perhaps an empty one,
            is yielded before that.

        Raises
        ------
        ApiError
            The step of a choice failed; the other choices are cancelled.
        """
        try:
            while self._running:
                self._at_once = at_once if not self._arrived else None
                await self._wait()
                self._at_once = None
                arrived, self._arrived = self._arrived, {}
                for index, piece in arrived.items():
                    self._count(index, piece)
                yield sorted(arrived.items())
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Stop what still runs; its pages are free at the end of the step under way."""
        if self._running:
            self._core.cancel(self._keys)
            self.reasons += ["cancelled"] * self._running
            self._running = 0

    async def _wait(self) -> None:
        """Wait for the next pieces; ApiError 504 where the request takes too long."""
        left = None if self._deadline is None else max(self._deadline - self.seconds, 0.0)
        try:
            await asyncio.wait_for(self._wake.wait(), left)
        except asyncio.TimeoutError:
            raise ApiError(
                504, f"the answer took longer than {self._deadline} s, this server's limit"
            ) from None
        self._wake.clear()

    def _take(self, index: int, piece: Piece) -> None:
        """Note a piece of a choice; called in the event loop's thread."""
        if self._at_once is not None and piece.finish_reason is None:
            self._count(index, piece)
            if not self._at_once(index, piece):
                self._at_once = None
                self._wake.set()
            return
        self._at_once = None
        held = self._arrived.get(index)
        if held is None:
            self._arrived[index] = piece
        else:
            held.add(piece)
        self._wake.set()

    def _count(self, index: int, piece: Piece) -> None:
        if piece.tokens:
            now = time.perf_counter()
            if self.first_token_s is None:
                self.first_token_s = now - self._started
            else:
                self.gaps.append((now - self._last) / len(piece.tokens))
            self._last = now
        self.usage.completion_tokens += len(piece.tokens)
        if piece.finish_reason is not None:
            self._running -= 1
            self.reasons.append(piece.finish_reason)
            if self._requests[index].stream == 0:  # a prompt's further choices share its pages
                self.usage.cached_tokens += piece.cached_tokens
        if piece.finish_reason == "error":
            raise piece.error or ApiError(500, "this answer failed")
