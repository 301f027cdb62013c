"""Turn tokens into text piece by piece: whole characters only, and never part of a stop string.

A token of a byte-level vocabulary may end inside a UTF-8 character, and byte-fallback vocabularies
spell a character as several byte tokens, so text appears only when it is decided: `Detokenizer`
decodes a short window of tokens and holds back a trailing U+FFFD for as long as a character may
still come of it. `StopFilter` holds back text that may become a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT_TOKENS = 6
_CHARACTER = 4  # bytes of a character at most, and so tokens
_WINDOW = 32  # tokens that are decoded at most, once nothing but broken characters comes
_UNDECIDED = "\ufffd"  # the replacement character


class Detokenizer:
    """Incremental decoder over a `tokenizers.Tokenizer`.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        Special tokens are left out of the text.
    prompt : sequence of int
        Its last tokens are the context of the first new one: decoders of SentencePiece type drop
        a leading space at the start of a text, which must survive in the middle of one.

    Notes
    -----
    ``_tokens[:_read]`` have been emitted; ``_tokens[_start:_read]`` are the context. The new text
    is the difference between decoding the window with and without the tokens after ``_read``.
    Where more tokens than a character has have come since and the text still ends in U+FFFD, all
    but the last of it is certain: it is emitted too, and ``_shown`` says how much of the window's
    text that was. So the window is bounded, and the work linear, whatever the tokens are.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()):
        self._decode = tokenizer.decode
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        self._start = 0
        self._read = len(self._tokens)
        self._shown: int | None = None

    def add(self, token: int) -> str:
        """Take one token and return the text that it decides, perhaps none."""
        self._tokens.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """Return what is left at the end, incomplete characters as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        after = self._decode(self._tokens[self._start :])
        shown = self._shown
        if shown is None:
            before = self._decode(self._tokens[self._start : self._read])
            shown = len(before)
            if len(after) > shown and not after.startswith(before.rstrip(_UNDECIDED)):
                # The new token completes a character that the prompt's end had broken off.
                shown = len(_common_prefix(before, after))
        if after.endswith(_UNDECIDED) and not final:
            return self._certain(after, shown)
        if len(after) <= shown:
            if after and len(self._tokens) == self._read + 1:
                self._tokens.pop()  # a special token: without text, and no context for others
            else:
                self._forget(after, shown)
            return ""
        count = len(self._tokens)
        self._start = self._read if self._shown is None else max(0, count - _CONTEXT_TOKENS)
        self._read, self._shown = count, None
        return after[shown:]

    def _certain(self, text: str, shown: int) -> str:
        """Return what no further token changes of a window's text that ends in U+FFFD."""
        if len(self._tokens) - self._read < _CHARACTER:
            return ""
        broken = len(text) - len(text.rstrip(_UNDECIDED))
        end = max(shown, len(text) - min(broken, _CHARACTER - 1))
        self._forget(text, end)
        return text[shown:end]

    def _forget(self, text: str, shown: int) -> None:
        """Note that ``shown`` characters of the window's text are out; shorten a long window."""
        if len(self._tokens) - self._start > _WINDOW:
            del self._tokens[: -2 * _CONTEXT_TOKENS]
            left = len(text) - shown
            self._start = self._read = 0
            text = self._decode(self._tokens)
            shown = max(0, len(text) - left)
        self._shown = shown


class StopFilter:
    """Pass text through until a stop string appears; hold back what may become one."""

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped: str | None = None

    def add(self, text: str) -> str:
        """Take text and return what can be shown; ``stopped`` is set once a stop string is met."""
        if not self._stops or not text:
            return text
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            position, self.stopped = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            shown, self._held = self._held[:position], ""
            return shown
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """Return what was held back, once no more text will come."""
        shown, self._held = self._held, ""
        return shown


def special_stops(tokenizer: Any, stops: Sequence[str]) -> set[int]:
    """Return the ids of those stop strings that are special tokens of a `tokenizers.Tokenizer`.

    Special tokens are left out of the text, so a filter of text would never see them.
    """
    ids = {tokenizer.token_to_id(stop) for stop in stops} - {None}
    added = tokenizer.get_added_tokens_decoder() if ids else {}
    return {index for index in ids if index in added and added[index].special}


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _common_prefix(a: str, b: str) -> str:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return a[:count]
