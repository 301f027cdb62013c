"""Finished sequences that stay in the cache, for prompts that begin like them.

A conversation's next turn begins with all of the turns before, and many requests begin with one
system prompt. What is kept is forked at the exact token; the least recently used goes first when
pages or places run out. Sequences of different owners (`Request.owner`, the ``salt`` here) never
meet: adapters make other keys and values, and who shares a prefix with whom could be read from the
time that an answer takes.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from amx_tvm.runtime.request import Handle
from amx_tvm.runtime.session import Sequence, common_prefix

_WORTH_WAITING = 16  # tokens of a common beginning for which a request waits for another's prompt
_WORTH_SHARING = 16  # and for which it is a fork: that takes a page of its own, and a copy


class Prefixes:
    """Kept sequences, the least recently used first.

    Parameters
    ----------
    most : int
        Most sequences that are kept; 0 keeps none.
    """

    def __init__(self, most: int):
        self.most = most
        self._kept: OrderedDict[int, tuple[str, np.ndarray, Sequence]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return len(self._kept)

    def pages(self, page_size: int) -> int:
        """Return how many pages the kept sequences fill; those that they share count for each."""
        return sum(-(-held.size // page_size) for _, held, _ in self._kept.values())

    def keep(self, sequence: Sequence, salt: str = "") -> None:
        """Take over a sequence that nobody extends any more; one that it contains is freed."""
        if not self.most:
            sequence.close()
            return
        tokens = np.array(sequence.tokens, np.int32)
        best, common = self._find(tokens, salt)
        if best is not None:
            held = self._kept[best][1]
            if common == tokens.size:  # nothing new
                sequence.close()
                return
            if common == held.size:
                self._drop(best)
        if not tokens.size:
            sequence.close()
            return
        while len(self._kept) >= self.most:
            self.shed()
        self._kept[self._count] = (salt, tokens, sequence)
        self._count += 1

    def best(self, tokens: list[int], salt: str = "") -> tuple[Sequence | None, int]:
        """Return the sequence that begins with most of ``tokens``, and how many it shares."""
        found, common = self._find(np.array(tokens, np.int32), salt)
        if found is None:
            return None, 0
        self._kept.move_to_end(found)
        return self._kept[found][2], common

    def shed(self, spared: Sequence | None = None) -> bool:
        """Free the least recently used sequence but ``spared``; False where there is none."""
        for key, (_, _, sequence) in self._kept.items():
            if sequence is not spared:
                self._drop(key)
                return True
        return False

    def clear(self) -> None:
        """Free all."""
        while self.shed():
            pass

    def _find(self, tokens: np.ndarray, salt: str) -> tuple[int | None, int]:
        """Return the key of the entry with the longest common beginning, and its length.

        Comparing a thousand tokens takes a microsecond, a tree of them would be slower in Python.
        """
        best, most = None, 0
        for key, (owner, held, _) in self._kept.items():
            size = min(held.size, tokens.size)
            if owner != salt or size <= most or held[0] != tokens[0]:
                continue
            unequal = held[:size] != tokens[:size]
            common = int(unequal.argmax()) if unequal.any() else size
            if common > most:
                best, most = key, common
        return best, most

    def relative(self, handle: Handle, active: list[Handle]) -> tuple[Sequence | None, int]:
        """Return the sequence under way that shares most of a request's tokens, and how many.

        The number is -1 where another is about to compute more of them: that is worth waiting for.
        """
        wanted = handle.tokens[:-1]  # at least one is left to run: the logits after it are wanted
        salt = handle.request.owner
        parent, best = self.best(wanted, salt)
        coming = best
        for other in active:
            if other.request.owner != salt:
                continue
            common = common_prefix(wanted, other.tokens)
            coming = max(coming, common)
            common = min(common, len(other.sequence))
            if common > best:
                best, parent = common, other.sequence
        if coming >= best + _WORTH_WAITING:
            return None, -1
        return (parent, best) if best >= _WORTH_SHARING else (None, 0)

    def _drop(self, key: int) -> None:
        self._kept.pop(key)[2].close()
