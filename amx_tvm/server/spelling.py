"""How single tokens are spelled in log-probabilities: as text, or as bytes inside a character."""

from __future__ import annotations

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Spelling:
    """Texts and bytes of a tokenizer's tokens.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        Whose tokens they are.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def text(self, token: int) -> str:
        """Return a token's text; "bytes:" and its bytes where it is no text by itself."""
        return self._spell(token)[0]

    def data(self, token: int) -> bytes:
        """Return a token's bytes."""
        return self._spell(token)[1]

    def _spell(self, token: int) -> tuple[str, bytes]:
        found = self._known.get(token)
        if found is None:
            text = self._tokenizer.decode([token], skip_special_tokens=False)
            data = text.encode()
            if "\ufffd" in text:
                data = _bytes_of(self._tokenizer.id_to_token(token) or "") or data
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            found = self._known[token] = (text, data)
        return found


def _bytes_of(entry: str) -> bytes | None:
    """Return the bytes of a vocabulary's entry, such as <0xE2>, or of byte-level characters."""
    if match := _BYTE.fullmatch(entry):
        return bytes([int(match[1], 16)])
    if all(char in _BYTE_LEVEL for char in entry):
        return bytes(_BYTE_LEVEL[char] for char in entry)
    return None


def _byte_level() -> dict[str, int]:
    """Return GPT-2's characters for bytes: printable ones are themselves, others follow 255."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTE_LEVEL = _byte_level()
