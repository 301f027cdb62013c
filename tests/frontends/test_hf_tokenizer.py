"""Tokenizers of Hugging Face directories: what the artifact keeps makes transformers' ids."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, processors

from amx_tvm.errors import ModelError
from amx_tvm.frontends.hf.tokenizer import read_tokenizer

from .conftest import one_line
from .small_tokenizers import FAMILIES, TEXTS, added, listed, surrounding, write_directory

transformers = pytest.importorskip("transformers")


def written(place):
    """Return the tokenizer that an artifact of the directory would hold."""
    made = read_tokenizer(place)
    made.write(place / "artifact")
    tokenizer = Tokenizer.from_file(str(place / "artifact" / "tokenizer.json"))
    assert made.prefix == tokenizer.encode("").ids[: len(made.prefix)]
    return tokenizer


def check(place, texts=TEXTS):
    """Compare ids with and without what surrounds a text, and the text of the ids."""
    ours, theirs = written(place), transformers.AutoTokenizer.from_pretrained(place)
    for text in texts:
        ids = theirs(text).input_ids
        assert ours.encode(text).ids == ids, text
        bare = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_special_tokens=False).ids == bare, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    return ours


TRAINING_STATE = {
    "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 32},
        "direction": "Right",
        "pad_to_multiple_of": 8,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<|stop|>",
    },
}


@pytest.mark.parametrize("parts", [("truncation",), ("padding",), ("truncation", "padding")])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_without_their_training_state(tmp_path, family, parts):
    place = write_directory(tmp_path, family)
    state = json.loads((place / "tokenizer.json").read_text())
    state.update({part: TRAINING_STATE[part] for part in parts})
    (place / "tokenizer.json").write_text(json.dumps(state))
    ours = check(place)
    assert ours.truncation is None and ours.padding is None


EXTRA = ["<|extra|>", "<|pad|>"]
VARIANTS = {
    "decoder": ({"added_tokens_decoder": {"900": added("<|extra|>"), "901": added("<|new|>")}}, {}),
    "decoder, out of order": (
        {"added_tokens_decoder": {"905": added("<tool>", special=False), "901": added("<|new|>")}},
        {},
    ),
    "decoder with flags": (
        {
            "added_tokens_decoder": {
                "900": added("<|new|>", lstrip=True, rstrip=True),
                "901": added("<tool>", special=False, single_word=True),
                "902": added("x", special=False, normalized=True),
            }
        },
        {},
    ),
    "decoder with other flags than tokenizer.json": (
        {"added_tokens_decoder": {"2": added("<|user|>", lstrip=True, rstrip=True)}},
        {},
    ),
    "decoder makes the map silent": (
        {"added_tokens_decoder": {"900": added("<|new|>")}},
        {"special_tokens_map": {"additional_special_tokens": EXTRA}},
    ),
    "named tokens": ({"pad_token": "<|pad|>", "mask_token": "<|new|>"}, {}),
    "named token as an object": (
        {"pad_token": {"__type": "AddedToken", **added("<|pad|>", lstrip=True)}},
        {},
    ),
    "token of the model's own": ({"image_token": "<|extra|>"}, {}),
    "additional list": ({"additional_special_tokens": EXTRA}, {}),
    "extra list": ({"extra_special_tokens": EXTRA}, {}),
    "extra dictionary": ({"extra_special_tokens": {"tool_token": "<tool>"}}, {}),
    "map": ({}, {"special_tokens_map": {"pad_token": "<|pad|>", "eos_token": "<|stop|>"}}),
    "map with objects": (
        {"pad_token": "<|new|>"},
        {"special_tokens_map": {"pad_token": added("<|pad|>", rstrip=True)}},
    ),
    "map with a list": ({}, {"special_tokens_map": {"additional_special_tokens": EXTRA}}),
    "added_tokens.json": (
        {"pad_token": "<|pad|>"},
        {"added_tokens": {"<|pad|>": 901, "<tool>": 900, "<|new|>": 902}},
    ),
    "flags": ({"add_bos_token": True, "add_eos_token": True}, {}),
    "flags off": ({"add_bos_token": False, "add_eos_token": False}, {}),
}


# One byte-level family, one sentencepiece family, and the class that transformers builds anew.
@pytest.mark.parametrize("family", ["llama3", "mistral", "smollm", "llama2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_flags_of_all_files(tmp_path, family, variant):
    config, files = VARIANTS[variant]
    tokenizer = FAMILIES[family][0]()
    if "added_tokens_decoder" in config:
        # As save_pretrained does, the decoder lists what tokenizer.json holds as well.
        own = {
            str(tokenizer.token_to_id(entry["content"]) or index): entry
            for index, entry in config["added_tokens_decoder"].items()
        }
        both = {**listed(tokenizer), **own}
        config = {**config, "added_tokens_decoder": both}
    check(write_directory(tmp_path, family, tokenizer, config, **files))


POST_PROCESSORS = {
    "none": None,
    "offsets": processors.ByteLevel(trim_offsets=False),
    "bos": "<|start|> $A",
    "eos": "$A <|stop|>",
    "both": "<|start|> $A <|stop|>",
    "two in front": "<|start|> <|user|> $A",
    "bert": processors.BertProcessing(("<|stop|>", 1), ("<|start|>", 0)),
}


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_eos_token": True}])
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_only_the_post_processor_surrounds_a_text(tmp_path, name, flags):
    tokenizer = FAMILIES["gpt-oss"][0]()
    processor = POST_PROCESSORS[name]
    if isinstance(processor, str):
        processor = surrounding(tokenizer, processor)
    if processor is not None:
        tokenizer.post_processor = processor
    place = write_directory(tmp_path, "gpt-oss", tokenizer, flags)
    check(place)
    made = read_tokenizer(place)
    config = json.loads((place / "artifact" / "tokenizer_config.json").read_text())
    prefix = {"bos": [0], "both": [0], "bert": [0], "two in front": [0, 2]}.get(name, [])
    assert made.prefix == prefix and config["add_bos_token"] is bool(prefix)
    assert made.suffix == ([1] if name in ("eos", "both", "bert") else [])
    assert made.generation_config({"eos_token_id": []}, 1024)["prompt_prefix"] == prefix


@pytest.mark.parametrize(
    "config, files",
    [
        ({"added_tokens_decoder": {"one": added("x")}}, {}),
        ({"added_tokens_decoder": {"900": {"special": True}}}, {}),
        ({"added_tokens_decoder": {"900": 5}}, {}),
        ({"extra_special_tokens": 5}, {}),
        ({"extra_special_tokens": [5]}, {}),
        ({}, {"added_tokens": {"x": "y"}}),
    ],
)
def test_damaged_lists_of_tokens(tmp_path, config, files):
    place = write_directory(tmp_path, "smollm", config=config, **files)
    with pytest.raises(ModelError) as caught:
        read_tokenizer(place)
    assert "tokenizer_config.json" in one_line(caught.value)


@pytest.mark.parametrize(
    "config, tokens, ends",
    [
        ({}, {}, [7, 5, 1]),  # generation_config, config, the tokenizer's EOS
        ({"eos_token": {"content": "<|user|>"}}, {}, [7, 5, 2]),
        ({"eos_token": None}, {}, [7, 5]),
        ({"eos_token": "no token"}, {"602": "<|im_end|>"}, [7, 5, 601, 600]),
        ({}, {"600": "<|eot_id|>", "601": "<end_of_turn>"}, [7, 5, 1, 600, 601]),
        ({}, {"600": "<|end|>", "601": "<|return|>"}, [7, 5, 1, 600, 601]),
        ({}, {"600": "<|end|>", "601": "<|return|>", "602": "<|call|>"}, [7, 5, 1, 601, 602]),
    ],
)
def test_ends_are_the_union_of_all_that_name_one(tmp_path, config, tokens, ends):
    tokenizer = FAMILIES["smollm"][0]()
    first = tokenizer.get_vocab_size()
    decoder = {index: added(text) for index, text in tokens.items()}
    config = {**config, "added_tokens_decoder": {**listed(tokenizer), **decoder}}
    place = write_directory(tmp_path, "smollm", tokenizer, config)
    given = {"eos_token_id": [7, 5]}
    found = read_tokenizer(place).generation_config(given, 1024)["eos_token_id"]
    assert found == [index if index < 600 else index - 600 + first for index in ends]
    # Tokens that the model cannot choose end nothing.
    found = read_tokenizer(place).generation_config(given, first)["eos_token_id"]
    assert found == [index for index in ends if index < 600]


@pytest.mark.parametrize(
    "stored, files",
    [
        ("C", {}),
        ("C", {"chat_template.jinja": "J"}),
        ("C", {"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "T"}),
        ("C", {"additional_chat_templates/rag.jinja": "R"}),
        ([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}], {}),
        ([{"name": "default", "template": "D"}], {}),
        (None, {}),
    ],
)
def test_chat_templates_of_all_files(tmp_path, stored, files):
    config = {"chat_template": stored} if stored else {}
    place = write_directory(tmp_path, "smollm", config=config)
    (place / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (place / name).write_text(text)
    theirs = transformers.AutoTokenizer.from_pretrained(place).chat_template
    ours = read_tokenizer(place).config.get("chat_template")
    if isinstance(theirs, dict) and list(theirs) == ["default"]:
        theirs = theirs["default"]
    if isinstance(theirs, dict):
        ours = {entry["name"]: entry["template"] for entry in ours}
    assert ours == theirs


def test_chat_templates_that_are_no_text(tmp_path):
    for entry in ({"name": "default"}, {"name": [], "template": "x"}, {"name": {}, "template": 1}):
        place = write_directory(tmp_path, "smollm", config={"chat_template": [entry]})
        with pytest.raises(ModelError, match="chat template.*no text"):
            read_tokenizer(place)
    place = write_directory(tmp_path, "smollm")
    (place / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="chat_template.jinja"):
        read_tokenizer(place)
