"""Which decode makes 16-bit words of a linear's weights."""

from __future__ import annotations

from typing import Any

from relax_passes.spec import LinearSpec

from . import byte_words, pair_words
from .byte_words import ByteWords
from .pair_words import PairWords


def word_decoder(spec: LinearSpec, isa: Any) -> type[PairWords] | type[ByteWords] | None:
    """Return the class of the decode, None where weights cannot be words."""
    if pair_words.supports(spec, isa):
        return PairWords
    return ByteWords if byte_words.supports(spec, isa) else None
