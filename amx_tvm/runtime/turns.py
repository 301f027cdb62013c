"""What the next step adds to each request's sequence.

A request is tokens of which a part is in the cache: one that lacks a single token decodes, one that
lacks more is filling, be it a prompt or everything after a preemption. Where a call that mixes both
is no faster than two (`Model.mixes`), they take turns.
"""

from __future__ import annotations

from collections.abc import Callable

from amx_tvm.runtime.model import Model
from amx_tvm.runtime.request import Handle

Parts = list[tuple[Handle, int]]  # requests, and how many tokens of each a step adds


class Turns:
    """Divides the rows of steps among requests.

    Parameters
    ----------
    model : Model
        Whose steps they are.
    prefill_rows : int or None
        Most tokens of prompts for each step of those that decode; None is as many as a step takes.

    Attributes
    ----------
    limit : callable
        Given the parts of those that decode, returns ``prefill_rows``: it may be another's.
    between : callable or None
        Called between the kernels of a chunk of prompts that holds others up, with a function that
        runs their step and returns how many they were; where the scheduler `pauses`. Nothing may
        be cancelled within it.
    most : int
        Rows of a step.
    last : tuple of int
        How many requests the last step continued, and how many tokens of prompts it computed.
    """

    def __init__(self, model: Model, prefill_rows: int | None):
        rows = model.chunk if prefill_rows is None else prefill_rows
        self.limit: Callable[[Parts], int] = lambda _: rows
        self.between: Callable[[Callable[[], int]], None] | None = None
        self.last = (0, 0)
        self.most = model.chunk
        self._model = model
        self._decoded = False  # whether it is the prompts' turn

    def parts(self, active: list[Handle]) -> Parts:
        """Return the next step's part of each request."""
        if self._model.pictures is not None:
            active = self._model.pictures.ready(active)
        decoding: Parts = []
        filling: list[Handle] = []
        if self._model.long_after:
            for handle in active:
                handle.sequence.turn(len(handle.tokens))
        for handle in active:
            if len(handle.tokens) - len(handle.sequence.tokens) == 1:
                decoding.append((handle, 1))
            else:
                filling.append(handle)
        self._decoded = bool(decoding) and not (filling and self._decoded)
        if not filling or (self._decoded and not self._model.mixes):
            self.last = (len(decoding), 0)
            return decoding
        mixed = decoding if self._model.mixes else []
        room = self._model.chunk - len(mixed)
        filled = self._filled(filling, min(room, self.limit(decoding)) if decoding else room)
        self.last = (len(mixed), sum(count for _, count in filled))
        return mixed + filled

    def go_on(self) -> None:
        """Let prompts have the next step too."""
        self._decoded = True

    @staticmethod
    def decoding(active: list[Handle]) -> Parts:
        """Return the part of each request that lacks its last token only."""
        return [(h, 1) for h in active if len(h.tokens) - len(h.sequence.tokens) == 1]

    @staticmethod
    def _filled(filling: list[Handle], room: int) -> Parts:
        """Return the parts of those that fill, in their order, until the room is used up."""
        parts: Parts = []
        for handle in filling:
            count = min(room, len(handle.tokens) - len(handle.sequence))
            if count > 0:
                parts.append((handle, count))
                room -= count
        return parts
