"""Texts to measure and to calibrate by: what a file that is none is refused with."""

from __future__ import annotations

import pytest

from amx_tvm.documents import read_documents
from amx_tvm.errors import EvaluationError


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "cannot be read as .txt: 'utf-8' codec"),
        ("a.jsonl", b'{"text": 3}', "entry 0 of .* has no text in its field 'text', but a int"),
        ("a.jsonl", b'{"words": "a"}', "has no text field 'text'; it has: words"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "cannot be read as .jsonl"),
        ("a.jsonl", rb'{"text": "half a character: \ud800"}', "surrogates not allowed"),
        ("a.jsonl", b"[" * 100_000, "its JSON is nested too deeply"),
        ("a.json", b"[" * 100_000, "its JSON is nested too deeply"),
    ],
)
def test_what_is_no_text(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        list(read_documents(file))


def test_what_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rb'{"text": "\ud83d\ude00"}')  # a whole one in two halves
    (tmp_path / "b.txt").write_text("b\n")
    assert list(read_documents(tmp_path)) == ["\U0001f600", "b\n"]
