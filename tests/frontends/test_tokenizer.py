"""Tokenizers from GGUF vocabularies against llama.cpp's ids, and copies of Hugging Face's files."""

from __future__ import annotations

import heapq
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from amx_tvm.errors import ModelError
from amx_tvm.frontends import open_model
from amx_tvm.frontends.gguf.pretokenizers import KINDS
from amx_tvm.frontends.gguf.tokenizer import build_tokenizer

from .conftest import CONFIG, DATA, one_line

# Token ids by llama.cpp; see the file's "origin".
GOLDEN = json.loads((DATA / "llama_cpp_tokens.json").read_text())


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def smollm2_files(smollm2, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    assert smollm2.write_tokenizer(directory) == ["tokenizer.json", "tokenizer_config.json"]
    return directory


def test_smollm2_equals_llama_cpp(smollm2_files):
    tokenizer = Tokenizer.from_file(str(smollm2_files / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 49152
    golden = GOLDEN["smollm"]
    for text, expected in zip(golden["texts"], golden["ids"], strict=True):
        assert ids(tokenizer, text) == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=False) == text


def test_smollm2_known_ids(smollm2_files):
    tokenizer = Tokenizer.from_file(str(smollm2_files / "tokenizer.json"))
    chat = "<|im_start|>user\nHi<|im_end|>\n"
    assert ids(tokenizer, chat) == [1, 4093, 198, 26843, 2, 198]
    assert tokenizer.decode(ids(tokenizer, chat)) == "user\nHi\n"  # special tokens are left out


def test_smollm2_configuration(smollm2_files):
    config = json.loads((smollm2_files / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|im_start|>" and config["eos_token"] == "<|im_end|>"
    assert config["add_bos_token"] is False and config["add_eos_token"] is False
    assert "<|im_start|>" in config["chat_template"]


@pytest.mark.parametrize("kind", sorted(GOLDEN["kinds"]["ids"]))
def test_pre_tokenizers_equal_llama_cpp(smollm2, kind):
    tokenizer = build_tokenizer({**smollm2.metadata, "tokenizer.ggml.pre": kind}, "a test")
    texts, golden = GOLDEN["kinds"]["texts"], GOLDEN["kinds"]["ids"][kind]
    for text, expected in zip(texts, golden, strict=True):
        assert ids(tokenizer, text) == expected, text


def test_every_different_pre_tokenizer_has_golden_ids():
    tested = {KINDS[name].patterns for name in [*GOLDEN["kinds"]["ids"], "smollm"]}
    assert {kind.patterns for kind in KINDS.values()} == tested


def test_qwen2_composes_characters(smollm2):
    tokenizer = build_tokenizer({**smollm2.metadata, "tokenizer.ggml.pre": "qwen2"}, "a test")
    assert ids(tokenizer, "e\u0301") == ids(tokenizer, "\u00e9")


def test_bos_is_added_as_the_file_says(smollm2):
    plain = build_tokenizer(smollm2.metadata, "a test")
    assert plain.encode("Hi").ids == [26843]
    adds = build_tokenizer({**smollm2.metadata, "tokenizer.ggml.add_bos_token": True}, "a test")
    assert adds.encode("Hi").ids == [1, 26843] and ids(adds, "Hi") == [26843]
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert build_tokenizer({**smollm2.metadata, **both}, "a test").encode("Hi").ids == [1, 26843, 2]


def test_unknown_pre_tokenizer(smollm2):
    with pytest.raises(ModelError, match="'new-kind'.*smollm"):
        build_tokenizer({**smollm2.metadata, "tokenizer.ggml.pre": "new-kind"}, "a test")


# ---- sentencepiece vocabularies


def sentencepiece(pieces, prefix=True, user_defined=()):
    """Return GGUF keys of a vocabulary: <unk>, <s>, </s>, 256 bytes, then pieces, best first."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [2, 3, 3] + [6] * 256 + [4 if piece in user_defined else 1 for piece in pieces]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


PIECES = [
    "▁t", "he", "▁the", "in", "re", "▁a", "er", "on", "at", "en", "▁there", "▁▁", "▁▁▁▁", "an",
    "ca", "cat", "▁cat", "th", "the", "▁", "t", "h", "e", "i", "n", "r", "a", "o", "c", "é", "\n",
]  # fmt: skip


def joined_by_score(metadata, text):
    """Encode as sentencepiece defines it: join the best-scoring neighbours, the leftmost first."""
    index = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    text = text.replace(" ", "▁")
    symbols = list("▁" + text if metadata["tokenizer.ggml.add_space_prefix"] and text else text)
    while True:
        pairs = [
            (-scores[index[left + right]], place)
            for place, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
            if left + right in index
        ]
        if not pairs:
            break
        place = heapq.nsmallest(1, pairs)[0][1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    result = []
    for symbol in symbols:
        known = [index[symbol]] if symbol in index else None
        result += known or [index[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return result


@settings(max_examples=300)
@given(text=st.text(alphabet="the rinaoc é\nZ€", max_size=40), prefix=st.booleans())
@example(text="there  the    cat €", prefix=True)
@example(text="", prefix=True)
def test_sentencepiece_joins_by_score(text, prefix):
    metadata = sentencepiece(PIECES, prefix)
    tokenizer = build_tokenizer(metadata, "a test")
    encoded = ids(tokenizer, text)
    assert encoded == joined_by_score(metadata, text)
    assert tokenizer.decode(encoded) == text


def test_sentencepiece_defaults():
    tokenizer = build_tokenizer(sentencepiece(PIECES), "a test")
    assert tokenizer.encode("the").tokens == ["<s>", "▁the"]  # BOS unless the file says no
    assert tokenizer.encode("a</s>the", add_special_tokens=False).tokens == ["▁a", "</s>", "▁the"]


def test_sentencepiece_user_defined_pieces_are_found_first():
    metadata = sentencepiece([*PIECES, "<b>", "  "], prefix=False, user_defined=("<b>", "  "))
    tokenizer = build_tokenizer(metadata, "a test")
    encoded = tokenizer.encode("cat<b>  the", add_special_tokens=False)
    assert encoded.tokens == ["cat", "<b>", "  ", "the"]
    assert tokenizer.decode(encoded.ids) == "cat<b>  the"


# ---- damaged vocabularies


def broken(metadata, **changes):
    metadata = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    with pytest.raises(ModelError) as caught:
        build_tokenizer({k: v for k, v in metadata.items() if v is not None}, "model.gguf")
    return one_line(caught.value)


def test_damaged_vocabularies(smollm2):
    plain, pieces = smollm2.metadata, sentencepiece(PIECES)
    assert "tokenizer.ggml.tokens" in broken(plain, tokens=None)
    assert "tokenizer.ggml.merges" in broken(plain, merges=None)
    assert "merges" in broken(plain, merges=["nospace"])
    assert "merges" in broken(plain, merges=["zzzz qqqq"])
    assert "'bert'" in broken(plain, model="bert")
    assert "token types" in broken(plain, token_type=np.ones(3, np.int32))
    assert "scores" in broken(pieces, scores=None)


# ---- Hugging Face directories


@pytest.fixture
def hf_tokenizer(model_dir):
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "[UNK]": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(model_dir / "tokenizer.json"))
    return tokenizer


def copied(model_dir, tmp_path, config=None):
    if config is not None:
        (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    files = open_model(model_dir).write_tokenizer(tmp_path / "out")
    assert sorted(files) == ["tokenizer.json", "tokenizer_config.json"]
    return json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_copy_keeps_the_tokenizer(model_dir, tmp_path, hf_tokenizer):
    written = copied(model_dir, tmp_path, {"bos_token": {"content": "<s>"}, "extra": 5})
    assert written["bos_token"] == "<s>" and written["extra"] == 5
    assert written["add_bos_token"] is False and "chat_template" not in written
    again = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert again.to_str() == hf_tokenizer.to_str()


def test_special_tokens_come_from_ids_where_the_file_is_silent(model_dir, tmp_path, hf_tokenizer):
    ids_of = {**CONFIG, "bos_token_id": 0, "eos_token_id": 1}
    (model_dir / "config.json").write_text(json.dumps(ids_of))
    written = copied(model_dir, tmp_path)
    assert written["bos_token"] == "<s>" and written["eos_token"] == "</s>"


def test_added_bos_is_found_in_the_post_processor(model_dir, tmp_path, hf_tokenizer):
    hf_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    hf_tokenizer.save(str(model_dir / "tokenizer.json"))
    written = copied(model_dir, tmp_path, {"bos_token": "<s>", "eos_token": "</s>"})
    assert written["add_bos_token"] is True and written["add_eos_token"] is False
    assert open_model(model_dir).generation_config["prompt_prefix"] == [0]


@pytest.mark.parametrize("place", ["config", "list", "jinja", "json"])
def test_chat_template_wherever_it_lies(model_dir, tmp_path, hf_tokenizer, place):
    config = {}
    if place == "config":
        config["chat_template"] = "T"
    elif place == "list":
        config["chat_template"] = [
            {"name": "default", "template": "T"},
        ]
    elif place == "jinja":
        (model_dir / "chat_template.jinja").write_text("T")
    else:
        (model_dir / "chat_template.json").write_text('{"chat_template": "T"}')
    assert copied(model_dir, tmp_path, config)["chat_template"] == "T"


def test_missing_and_damaged_tokenizer_json(model_dir, tmp_path):
    with pytest.raises(ModelError, match="tokenizer.json.*save_pretrained"):
        open_model(model_dir).write_tokenizer(tmp_path)
    (model_dir / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ModelError) as caught:
        open_model(model_dir).write_tokenizer(tmp_path)
    assert "tokenizer.json" in one_line(caught.value)
