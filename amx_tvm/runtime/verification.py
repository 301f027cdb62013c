"""A scheduler whose steps also verify drafts of what comes next, see `speculation`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from amx_tvm.runtime.request import Handle
from amx_tvm.runtime.scheduler import Scheduler
from amx_tvm.runtime.speculation import Speculation
from amx_tvm.runtime.worker import on_thread


class DraftingScheduler(Scheduler):
    """A `Scheduler` with drafts; ``speculation`` makes them and says which are worth it."""

    def __init__(self, *parts: Any, speculation: Speculation):
        super().__init__(*parts)
        self._speculation = speculation

    @on_thread
    def step(self) -> bool:
        """Run one step, with drafts where they pay; return whether anything is left to do."""
        if self._waiting:
            self._admit()
        handles = self._active.copy()
        if self._model.long_after:
            for handle in handles:
                handle.sequence.turn(len(handle.tokens))
        if not all(handle.result.token_ids and _lacks_one(handle) for handle in handles):
            return super().step()
        drafts = self._drafts(handles) if handles else None
        start = time.perf_counter()
        if drafts is None:
            more, rows = super().step(), len(handles)
        else:
            try:
                self._verify(handles, drafts)
            except Exception as error:
                self._recover([(handle, 1) for handle in handles], error)
            more, rows = bool(self._active or self._waiting), len(handles) + sum(map(len, drafts))
        if handles:
            self._speculation.cost.observe(rows, time.perf_counter() - start)
        return more

    def _drafts(self, handles: list[Handle]) -> list[list[int]] | None:
        """Return a draft for each request; None for a plain step."""
        drafts = self._speculation.drafts(handles)
        if drafts is None:
            return None
        for handle, draft in zip(handles, drafts, strict=True):
            length, long = len(handle.tokens), self._model.long_after
            if self._model.pictures is not None:  # images are copied by nobody
                vocab = self._model.vocab_size
                del draft[next((i for i, t in enumerate(draft) if t >= vocab), len(draft)) :]
            if length <= long:  # what follows turns by other frequencies
                del draft[long - length :]
        counts = [(handle, 1 + len(draft)) for handle, draft in zip(handles, drafts, strict=True)]
        return None if self._lacking(counts) else drafts

    def _verify(self, handles: list[Handle], drafts: list[list[int]]) -> None:
        """Add each request's last token and its draft, and take what the model says to them."""
        tokens: list[int] = []
        parts = [(handle, 1 + len(draft)) for handle, draft in zip(handles, drafts, strict=True)]
        for handle, draft in zip(handles, drafts, strict=True):
            tokens += [handle.tokens[-1], *draft]
        counts = [count for _, count in parts]
        given = self._given(parts, tokens) if self._model.long_after else tokens
        sequences = [handle.sequence.handle for handle in handles]
        logits = self._model.forward(self._cache, sequences, counts, given, counts)
        self.turns.last = (len(handles), 0)
        first = accepted = 0
        for (handle, count), draft in zip(parts, drafts, strict=True):
            rows = logits[first : first + count]
            if handle.sequence is not None:  # no callback of this step has cancelled it
                handle.sequence.tokens += tokens[first : first + count]
                accepted += self._accept(handle, draft, rows)
            first += count
        self._speculation.verified(sum(map(len, drafts)), accepted)

    def _accept(self, handle: Handle, draft: list[int], logits: np.ndarray) -> int:
        """Take tokens from logits [1 + draft, vocab] while they are the draft's.

        Returns how many were; the rest of the draft is taken back.
        """
        right = 0
        for row in logits:
            if not self._hear(handle, row):
                return right
            wanted = draft[right] if right < len(draft) else None
            if handle.run.finished or handle.tokens[-1] != wanted:
                break
            right += 1
        if handle.sequence is not None:
            handle.sequence.rollback(len(draft) - right)
            if handle.run.finished:
                self._end(handle)
        return right

    def _end(self, handle: Handle) -> None:
        super()._end(handle)
        if handle.error is None:
            self._speculation.remember(handle)


def _lacks_one(handle: Handle) -> bool:
    """Whether all but the last token of a request is in the cache."""
    return len(handle.tokens) == len(handle.sequence.tokens) + 1
