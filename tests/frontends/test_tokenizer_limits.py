"""Tokenizers of others: no step without an end, and errors of the library are refusals."""

from __future__ import annotations

import json
import os

import pytest
from tokenizers import Tokenizer, models

from amx_tvm.errors import ModelError
from amx_tvm.frontends.tokenizer_limits import guarded, load_tokenizer


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


GROWING = {"type": "Sequence", "normalizers": [replace("a", "aa")] * 40}
NOTHING = {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False}
BAD = {
    "growing": ({"normalizer": GROWING}, "40 steps that may make 1.1e.12 times"),
    "growing by a pattern": ({"normalizer": replace(".", "x" * 1000, "Regex")}, "1e.03 times"),
    "many": ({"normalizer": {**GROWING, "normalizers": [{"type": "NFC"}] * 100}}, "100 steps"),
    "nothing": ({"normalizer": replace("", "x")}, "a Replace of an empty text"),
    "nothing, split": ({"pre_tokenizer": NOTHING}, "a Split of an empty text"),
    "nothing, decoded": ({"decoder": replace("", "aa")}, "a Replace of an empty text"),
    "a large id": ({"model": {"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []}}, "vocab"),
    "a large added id": ({"added_tokens": [{"id": 1 << 31, "content": "x"}]}, "added_tokens.0..id"),
    "no model": ({"model": None}, "no tokenizer that can be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tokenizers(tmp_path, name):
    change, words = BAD[name]
    value = json.loads(Tokenizer(models.BPE({"a": 0}, [])).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**value, **change}))
    with pytest.raises(ModelError, match=words):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_deep_files_pipes_and_panics(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"normalizer":' * 100_000)
    with pytest.raises(ModelError, match="nested deeper"):
        load_tokenizer(tmp_path / "tokenizer.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="no regular file"):
        load_tokenizer(tmp_path / "pipe")

    class PanicError(BaseException):
        """What the library's panics are: above Exception."""

    def panics():
        raise PanicError("index out of bounds")

    with pytest.raises(ModelError, match="x: index out of bounds"):
        guarded(panics, "x")


def test_ordinary_steps_are_taken(tmp_path):
    value = json.loads(Tokenizer(models.BPE({"▁": 0, "a": 1}, [])).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**value, "normalizer": replace(" ", "▁")}))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("a a").ids == [1, 0, 1]
