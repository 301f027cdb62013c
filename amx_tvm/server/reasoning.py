"""The thinking part of an answer, apart from what it says: ``<think>...</think>`` at its start.

Models that were trained to think write it there, or their chat template has opened it already at
the prompt's end.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class Reasoning:
    """Reads one answer piece by piece.

    Parameters
    ----------
    inside : bool
        Whether the prompt ends within the thinking part.
    """

    def __init__(self, inside: bool):
        self._held = ""
        self._begun = False  # whether there was a thought but blanks
        self._state = "inside" if inside else "before"  # "before", "inside", "gap", "after"

    @property
    def over(self) -> bool:
        """Whether there are no more thoughts to come."""
        return self._state == "after"

    def add(self, text: str, last: bool = False) -> tuple[str, str]:
        """Take more text and return what it makes certain: of the thinking part, of the rest."""
        if self._state == "after":
            return "", text
        self._held += text
        thought = ""
        if self._state == "before":
            start = self._held.lstrip()
            if start.startswith(OPEN):
                self._state, self._held = "inside", start[len(OPEN) :]
            elif not last and OPEN.startswith(start):
                return "", ""
            else:
                self._state = "after"
        if self._state == "inside":
            thought, found, rest = self._held.partition(CLOSE)
            if not found and not last:
                kept = _beginning(thought)
                thought, rest = thought[: len(thought) - kept], thought[len(thought) - kept :]
            if not self._begun:
                thought = thought.lstrip()
                self._begun = bool(thought)
            self._held = rest
            if found:
                self._state = "gap"
        if self._state == "gap":
            self._held = self._held.lstrip()
            if self._held or last:
                self._state = "after"
        if self._state != "after":
            return thought, ""
        said, self._held = self._held, ""
        return thought, said


def _beginning(text: str) -> int:
    """Return how many characters at a text's end may become the mark that closes."""
    for count in range(min(len(text), len(CLOSE) - 1), 0, -1):
        if CLOSE.startswith(text[-count:]):
            return count
    return 0
