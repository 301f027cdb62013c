"""Where a text's last tokens occurred before: the longest match, and what followed it."""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence

LONGEST = 32  # tokens of a match beyond which a longer one says no more
_CANDIDATES = 8  # earlier places of the last two tokens that are looked at
_STEPS = 32  # places with their hash, theirs or not


class Lookup:
    """Where pairs of tokens occurred in a text: for the longest match with its end or another's.

    Parameters
    ----------
    tokens : mutable sequence of int
        The text; it may grow at its end, and `update` takes note.
    room : int
        How many tokens it may have before the table of pairs is made anew, for twice as many.
    """

    def __init__(self, tokens: MutableSequence[int], room: int = 256):
        self.tokens = tokens
        self._last = array("i", [-1]) * room  # hash of a pair -> where its second token is
        self._earlier = array("i")  # for each place, the one before of its hash; -1: none

    def update(self) -> None:
        """Take note of the tokens that have been added."""
        tokens, last, earlier = self.tokens, self._last, self._earlier
        if len(tokens) > len(last):
            last = self._last = array("i", [-1]) * (2 * len(tokens))
            del earlier[:]
        if not earlier and tokens:
            earlier.append(-1)
        for place in range(len(earlier), len(tokens)):
            slot = hash((tokens[place - 1], tokens[place])) % len(last)
            earlier.append(last[slot])
            last[slot] = place

    def repeated(self) -> tuple[int, int]:
        """Return the longest match of the text's end with an earlier part of it.

        Returns
        -------
        (int, int)
            Its length, 0 for none, and the place behind it.
        """
        if len(self.tokens) < 2:
            return 0, 0
        return self._longest(self.tokens, self._earlier[-1])

    def match(self, text: MutableSequence[int]) -> tuple[int, int]:
        """Return the longest match of another text's end, as `repeated` does."""
        if len(text) < 2:
            return 0, 0
        return self._longest(text, self._last[hash((text[-2], text[-1])) % len(self._last)])

    def _longest(self, text: MutableSequence[int], place: int) -> tuple[int, int]:
        best, behind, tokens, end = 0, 0, self.tokens, len(text) - 1
        looked = 0
        for _ in range(_STEPS):
            if place < 0 or looked == _CANDIDATES:
                break
            if tokens[place] != text[end] or tokens[place - 1] != text[end - 1]:
                place = self._earlier[place]
                continue
            looked += 1
            length, most = 2, min(LONGEST, place + 1, end + 1)
            while length < most and tokens[place - length] == text[end - length]:
                length += 1
            if length > best:
                best, behind = length, place + 1
                if length == LONGEST:
                    break
            place = self._earlier[place]
        return best, behind

    def following(self, behind: int, count: int) -> list[int]:
        """Return the tokens from a place on, at most ``count``; a text's end follows itself."""
        found = list(self.tokens[behind : behind + count])
        period = len(found)
        while period and len(found) < count:  # the match reaches the end: it is a period
            found.append(found[len(found) - period])
        return found
