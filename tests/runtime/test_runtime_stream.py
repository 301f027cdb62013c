"""Text pieces: whole characters, spaces where they belong, and no part of a stop string."""

from __future__ import annotations

import pytest
import toy_artifact as toy
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from amx_tvm.runtime.stream import Detokenizer, StopFilter, special_stops


@pytest.fixture(scope="module")
def byte_level():
    return toy.tokenizer()


@pytest.fixture(scope="module")
def byte_fallback():
    """A SentencePiece-like vocabulary: pieces with U+2581 for spaces, and <0x..> bytes."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ("\u2581the", "\u2581cat", "s", "\u2581", "\u2581\u20ac"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def pieces(tokenizer, tokens, prompt=()):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.add(token) for token in tokens] + [detokenizer.flush()]


@given(st.text(max_size=40))
def test_byte_level_pieces_join_to_the_text(text):
    tokenizer = toy.tokenizer()
    tokens = tokenizer.encode(text).ids
    parts = pieces(tokenizer, tokens)
    assert "".join(parts) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@given(st.text(max_size=12))
def test_byte_fallback_pieces_join_to_the_text(text):
    tokenizer = fallback_tokenizer()
    tokens = list(text.encode("utf-8"))
    assert "".join(pieces(tokenizer, tokens, prompt=[256])) == text


def fallback_tokenizer():
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"x": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def test_a_character_of_four_tokens_appears_once(byte_level):
    tokens = byte_level.encode("a\N{GRINNING FACE}b").ids
    assert pieces(byte_level, tokens) == ["a", "", "", "", "\N{GRINNING FACE}", "b", ""]


def test_broken_character_at_the_end_is_shown(byte_level):
    tokens = byte_level.encode("a\N{GRINNING FACE}").ids[:-1]
    assert pieces(byte_level, tokens)[-1] == "\N{REPLACEMENT CHARACTER}"


def test_leading_space_after_a_prompt_survives(byte_fallback):
    the, cat = 256, 257
    assert "".join(pieces(byte_fallback, [cat], prompt=[the])) == " cat"
    assert "".join(pieces(byte_fallback, [the, cat])) == "the cat"


def test_two_byte_characters_in_a_row(byte_fallback):
    tokens = list("\u20ac\N{GRINNING FACE}".encode())
    parts = pieces(byte_fallback, tokens, prompt=[256])
    assert "".join(parts) == "\u20ac\N{GRINNING FACE}"
    assert parts[2] == "\u20ac"


def test_special_tokens_are_left_out(byte_level):
    assert "".join(pieces(byte_level, [0, *byte_level.encode("the").ids])) == "the"


def feed(stops, parts):
    stop = StopFilter(stops)
    shown = []
    for part in parts:
        shown.append(stop.add(part))
        if stop.stopped is not None:
            return shown, stop.stopped
    return [*shown, stop.flush()], None


def test_stop_string_across_pieces():
    assert feed(["\n\nUser:"], ["Hi", "\n", "\nUs", "er:", "x"]) == (
        ["Hi", "", "", ""],
        "\n\nUser:",
    )


def test_what_only_began_a_stop_string_is_shown_later():
    assert feed(["abc"], ["xab", "abd"]) == (["x", "ababd", ""], None)
    assert feed(["abc"], ["xab"]) == (["x", "ab"], None)


def test_the_first_stop_string_wins():
    assert feed(["cd", "bc"], ["abcd"]) == (["a"], "bc")
    assert feed(["ab", "abc"], ["xabc"]) == (["x"], "abc")


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_stop_filter_equals_a_search_in_the_whole_text(text, stops, size):
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    shown, stopped = feed(stops, parts)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert "".join(shown) == text and stopped is None
    else:
        assert stopped is not None
        assert text.startswith("".join(shown) + stopped)
        assert not any(stop in "".join(shown) for stop in stops)


def test_stop_strings_that_are_special_tokens(byte_level, byte_fallback):
    assert special_stops(byte_level, ["<eos>", "the", "no token", ""]) == {0}
    byte_fallback = Tokenizer.from_str(byte_fallback.to_str())
    byte_fallback.add_tokens(["<tool>"])  # shown in the text, so the text is searched for it
    byte_fallback.add_special_tokens(["<|im_end|>"])
    end = byte_fallback.token_to_id("<|im_end|>")
    assert special_stops(byte_fallback, ["<tool>", "\u2581", "<|im_end|>"]) == {end}


@given(st.lists(st.integers(1, 256), max_size=120))
def test_any_bytes_join_to_what_decoding_them_together_gives(tokens):
    """Tokens 1 to 256 are single bytes: mostly broken UTF-8."""
    assert "".join(pieces(toy.tokenizer(), tokens)) == toy.tokenizer().decode(tokens)


@pytest.mark.parametrize("byte", [0x80, 0xC3, 0xE2, 0xF0, 0xFF])
@pytest.mark.parametrize("make", [fallback_tokenizer, toy.tokenizer], ids=["fallback", "level"])
def test_text_that_is_never_complete_is_shown_in_linear_time(make, byte):
    tokenizer = make()
    windows = []

    class Counting:
        @staticmethod
        def decode(ids):
            windows.append(len(ids))
            return tokenizer.decode(ids)

    token = byte
    if make is toy.tokenizer:
        token = next(i for i in range(1, 257) if tokenizer.id_to_token(i) == level_name(byte))
    parts = pieces(Counting(), [token] * 2000)
    assert "".join(parts) == tokenizer.decode([token] * 2000)
    assert max(windows) <= 40 and sum(windows) < 100 * 2000
    shown = sum(map(len, parts[:1000]))
    assert 990 < shown <= 1000  # nobody waits for the end


def level_name(byte):
    """The character by which byte-level vocabularies write a byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    return chr(byte) if byte in plain else chr(256 + other.index(byte))


@pytest.mark.parametrize("prompt", [[], [256]])
def test_endless_special_tokens_cost_no_more_and_keep_the_space(byte_fallback, prompt):
    byte_fallback = Tokenizer.from_str(byte_fallback.to_str())
    byte_fallback.add_special_tokens(["<end>"])
    end = byte_fallback.token_to_id("<end>")
    windows = []

    class Counting:
        @staticmethod
        def decode(ids):
            windows.append(len(ids))
            return byte_fallback.decode(ids)

    parts = pieces(Counting(), [256, *[end] * 500, 257], prompt)
    assert "".join(parts).strip() == "the cat"
    assert max(windows) <= 40
