"""GGUF token lists from the wild: types, doubles, bytes that are no UTF-8, special ids."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from amx_tvm.errors import ModelError
from amx_tvm.frontends.gguf.tokenizer import build_tokenizer, gguf_tokenizer
from amx_tvm.frontends.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
)

from .conftest import one_line

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
FIRST = len(ALPHABET)  # the id of the first token behind the bytes


def byte_level(*tokens, merges=(), **keys):
    """GGUF keys of a byte-level vocabulary: 256 bytes, then (text, type)."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*ALPHABET, *(text for text, _ in tokens)],
        "tokenizer.ggml.token_type": np.array([NORMAL] * 256 + [kind for _, kind in tokens]),
        "tokenizer.ggml.merges": list(merges),
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


def sentencepiece(*tokens, **keys):
    """GGUF keys of a sentencepiece vocabulary: <unk>, <s>, </s>, 256 bytes, then (text, type)."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *(kind for _, kind in tokens)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts + [text for text, _ in tokens],
        "tokenizer.ggml.token_type": np.array(kinds),
        "tokenizer.ggml.scores": -np.arange(len(kinds), dtype=np.float32),
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


def reloaded(metadata):
    return Tokenizer.from_str(build_tokenizer(metadata, "a test").to_str())


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
@pytest.mark.parametrize("text", ["<|im_end|>", "<end_of_turn>", "<eos>", "<turn|>", "<|eot_id|>"])
def test_ends_of_turns_are_control_tokens(make, kind, text):
    metadata = make((text, kind))
    end = len(metadata["tokenizer.ggml.tokens"]) - 1
    tokenizer = reloaded(metadata)
    assert ids(tokenizer, f"a{text}b").count(end) == 1 and tokenizer.decode([end]) == ""
    assert end in Vocabulary.read(metadata, "a test").end_ids()


def test_types():
    tokens = [("<|start|>", NORMAL), ("<think>", USER_DEFINED), ("<unk>", UNKNOWN), ("[U]", UNUSED)]
    tokenizer = reloaded(byte_level(*tokens))
    assert ids(tokenizer, "<|start|><think><unk>") == [FIRST, FIRST + 1, FIRST + 2]
    assert tokenizer.decode([FIRST, FIRST + 1, FIRST + 2]) == "<think>"
    assert ids(tokenizer, "[U]") == [ALPHABET.index(letter) for letter in "[U]"]
    assert tokenizer.decode([FIRST + 3, ALPHABET.index("a"), FIRST + 3]) == "a"
    # Signs that only begin like a control token stay text.
    plain = reloaded(byte_level(("<|", NORMAL), ("|>", NORMAL), ("<| |>", NORMAL)))
    assert FIRST + 2 not in ids(plain, "<| |>") and plain.decode([FIRST]) == "<|"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("kind, shown", [(USER_DEFINED, True), (CONTROL, False)])
def test_words_that_fine_tuning_has_added(make, kind, shown):
    """They are found inside a text; what a converter took for control tokens is never shown."""
    metadata = make(("assessee", kind), ("total income", kind))
    tokenizer, end = reloaded(metadata), len(metadata["tokenizer.ggml.tokens"])
    found = ids(tokenizer, "the assessee has total income.")
    assert [token for token in found if token >= end - 2] == [end - 2, end - 1]
    text = tokenizer.decode(found)
    assert ("assessee" in text, "total income" in text) == (shown, shown) and "has" in text


def test_types_may_be_missing():
    metadata = byte_level(("<|im_end|>", NORMAL), eos_token_id=0)
    del metadata["tokenizer.ggml.token_type"]
    assert Vocabulary.read(metadata, "a test").end_ids() == [0, FIRST]


def test_phi3_eats_the_spaces_behind_its_special_tokens():
    tokens = [("<|user|>", CONTROL), ("<|endoftext|>", CONTROL)]
    for name, expected in (("Phi-3 mini", 0), ("other", 1)):
        tokenizer = reloaded({**byte_level(*tokens), "general.name": name})
        space = ALPHABET.index("Ġ")
        assert ids(tokenizer, "<|user|> a").count(space) == expected
        assert ids(tokenizer, "<|endoftext|> a").count(space) == 1


# ---- the same text twice, and texts that are no UTF-8


def test_the_last_of_equal_tokens_is_the_one_that_is_encoded():
    tokens = [("ab", NORMAL), ("ab", NORMAL), ("Ġ", NORMAL), ("ab", UNUSED), ("ab", NORMAL)]
    tokenizer = reloaded(byte_level(*tokens, merges=["a b"]))
    assert ids(tokenizer, "ab") == [FIRST + 4]
    assert [tokenizer.decode([FIRST + i]) for i in (0, 1, 3, 4)] == ["ab"] * 4  # a merge makes it
    assert ids(tokenizer, "a b") == [ALPHABET.index("a"), FIRST + 2, ALPHABET.index("b")]
    assert tokenizer.decode([ALPHABET.index("Ġ")]) == " "  # the byte that is shadowed


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
def test_equal_special_tokens(kind):
    tokenizer = reloaded(byte_level(("<|x|>", kind), ("<|x|>", kind)))
    assert ids(tokenizer, "<|x|>") == [FIRST + 1]
    assert tokenizer.get_vocab_size() == FIRST + 2


def test_equal_pieces():
    metadata = sentencepiece(*((piece, NORMAL) for piece in ("a", "b", "ab", "▁", "ab", "▁")))
    metadata["tokenizer.ggml.add_space_prefix"] = False
    tokenizer = reloaded(metadata)
    start = len(metadata["tokenizer.ggml.tokens"]) - 6
    assert ids(tokenizer, "ab ab") == [start + 4, start + 5, start + 4]
    assert tokenizer.decode([start + 2, start + 3, start + 4]) == "ab ab"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_tokens_that_are_no_utf8(make):
    broken = [b"\xff\xfe".decode("utf-8", "surrogateescape"), "\udcfd\udcfc", "ok"]
    metadata = make(*((text, NORMAL) for text in broken))
    tokenizer = reloaded(metadata)
    start = len(metadata["tokenizer.ggml.tokens"]) - 3
    assert tokenizer.decode([start]) == "\ufffd\ufffd" == tokenizer.decode([start + 1])
    assert not {start, start + 1} & set(ids(tokenizer, "\ufffd\ufffd \ufffd"))


def test_empty_texts():
    tokenizer = reloaded(byte_level(("", NORMAL), ("", NORMAL), ("", UNUSED)))
    assert tokenizer.id_to_token(FIRST + 1) == f"[EMPTY_{FIRST + 1}]"
    assert tokenizer.decode([FIRST + 2]) == ""


# ---- special ids


def test_end_ids_begin_with_the_declared_ones():
    tokens = [("<|endoftext|>", CONTROL), ("<|im_end|>", NORMAL), ("x", CONTROL), ("y", CONTROL)]
    keys = {"eos_token_id": FIRST + 2, "eot_token_id": FIRST + 1, "eom_token_id": FIRST + 3}
    vocabulary = Vocabulary.read(byte_level(*tokens, **keys), "a test")
    assert vocabulary.end_ids() == [FIRST + 2, FIRST + 1, FIRST + 3, FIRST]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("text, special", [("</s>", True), ("[EOS]", True), ("ok", False)])
def test_declared_ends_are_control_tokens_if_they_look_like_tags(make, text, special):
    metadata = make((text, NORMAL), ("x", NORMAL))
    end = len(metadata["tokenizer.ggml.tokens"]) - 2
    metadata["tokenizer.ggml.eos_token_id"] = end
    tokenizer = reloaded(metadata)
    assert (tokenizer.decode([end]) == "") is special
    assert (end in ids(tokenizer, f"x{text}x")) is special


def test_a_message_of_harmony_does_not_end_the_turn():
    harmony = [("<|end|>", CONTROL), ("<|return|>", CONTROL), ("<|call|>", CONTROL)]
    assert Vocabulary.read(byte_level(*harmony), "").end_ids() == [FIRST + 1, FIRST + 2]
    assert Vocabulary.read(byte_level(*harmony[:2]), "").end_ids() == [FIRST, FIRST + 1]


def test_sentencepiece_has_special_ids_where_the_file_is_silent():
    vocabulary = Vocabulary.read(sentencepiece(("a", NORMAL)), "a test")
    assert vocabulary.special == {"bos": 1, "eos": 2, "unknown": 0}
    assert vocabulary.generation_config()["prompt_prefix"] == [1]
    assert Vocabulary.read(byte_level(), "a test").special == {}


@pytest.mark.parametrize("key", ["bos", "eos", "eot", "eom", "unknown", "padding"])
def test_special_ids_that_are_no_tokens(key):
    for index in (FIRST, 2**31, -7, "one"):
        with pytest.raises(ModelError) as caught:
            Vocabulary.read(byte_level(**{f"{key}_token_id": index}), "m.gguf")
        assert f"tokenizer.ggml.{key}_token_id" in one_line(caught.value)
    for null in (-1, 2**32 - 1):  # "none", in the two types that files use
        assert key not in Vocabulary.read(byte_level(**{f"{key}_token_id": null}), "m.gguf").special


def test_what_a_prompt_begins_with():
    for flag, prefix in ((True, [5]), (False, []), (None, [])):
        keys = {} if flag is None else {"add_bos_token": flag}
        metadata = byte_level(bos_token_id=5, **keys)
        assert Vocabulary.read(metadata, "").generation_config()["prompt_prefix"] == prefix
        assert gguf_tokenizer(metadata, 64, "").prefix == prefix
    # A flag without a token adds nothing.
    assert not Vocabulary.read(byte_level(add_bos_token=True), "").adds("bos")
    assert gguf_tokenizer(byte_level(add_bos_token=True), 64, "").prefix == []


# ---- chat templates


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, None),
        ({"": "T"}, "T"),
        (
            {"": "T", ".tool_use": "U", ".rag": "R"},
            [("default", "T"), ("rag", "R"), ("tool_use", "U")],
        ),
        ({".tool_use": "U"}, [("tool_use", "U")]),
    ],
)
def test_chat_templates(keys, expected):
    metadata = byte_level()
    metadata.update({f"tokenizer.chat_template{key}": value for key, value in keys.items()})
    metadata["tokenizer.chat_templates"] = ["tool_use", "rag"]  # the list of names beside them
    found = gguf_tokenizer(metadata, 64, "").config.get("chat_template")
    if isinstance(expected, list):
        expected = [{"name": name, "template": text} for name, text in expected]
    assert found == expected
