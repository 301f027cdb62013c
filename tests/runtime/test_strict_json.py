"""JSON of others: bounded, and errors of the caller's class that name the file or the field."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, TypedDict

import pytest

from amx_tvm.errors import ArtifactError, ModelError
from amx_tvm.schema import Count, FileName, Mismatch, Range, conform
from amx_tvm.strict_json import MAX_DEPTH, MAX_VALUES, depth_of, parse_json, read_json

BAD = {
    "deep": ("[" * 100_000, "nested deeper"),
    "deeper than is walked": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested deeper"),
    "more values than memory": ("[" + "{}," * MAX_VALUES + "1]", f"more than {MAX_VALUES} values"),
    "no JSON": ("{,}", "cannot be read as JSON"),
    "no UTF-8": (b'"\xff"', "cannot be read as JSON"),
    "a huge number": ("1" + "0" * 5000, "cannot be read as JSON"),
    "half a pair": (r'{"a": "\ud800"}', "surrogate"),
    "half a pair as a key": (r'{"\udfff": 1}', "surrogate"),
    "a key twice": ('{"a": 1, "a": 2}', "'a' stands in one object twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_texts(name):
    text, words = BAD[name]
    with pytest.raises(ModelError, match=f"config.json.*{words}"):
        parse_json(text, "config.json", ModelError, unique=True)


def test_good_texts():
    assert parse_json('{"a": "\\ud83d\\ude00", "b": 1e400}', "x", ModelError)["a"] == "😀"
    assert depth_of([{"a": [1]}, 2]) == 3 and depth_of("x") == 0


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * 100)
    for place, words in (
        (tmp_path / "pipe", "no regular file"),
        ("/dev/zero", "no regular file"),
        (tmp_path, "no regular file"),
        (tmp_path / "large", "at most 50 are read"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(ArtifactError, match=words):
            read_json(place, ArtifactError, limit=50)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", ArtifactError)


class Inner(TypedDict, total=False):
    size: Count


@dataclass(frozen=True)
class Record:
    name: FileName
    inner: Inner
    share: Annotated[float, Range(0, 1)] = 0.5
    ids: int | list[int] | None = None


def test_a_schema_is_followed():
    made = conform(Record, {"name": "a/b", "inner": {"size": 3.0, "more": []}, "share": 1})
    assert made == Record("a/b", {"size": 3, "more": []}, 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "../b"}, "name is '../b'; expected a text that names a file inside"),
        ({"name": "/b"}, "names a file inside"),
        ({"inner": {"size": 0}}, "inner.size is 0; expected a whole number from 1"),
        ({"inner": {"size": True}}, "inner.size is True; expected a whole number"),
        ({"inner": {"size": 2.5}}, "inner.size is 2.5"),
        ({"inner": []}, "inner is a list; expected an object"),
        ({"share": float("nan")}, "share is nan; expected a finite number"),
        ({"share": 10**400}, "share is 1000"),
        ({"ids": [1, "2"]}, r"ids\[1\] is '2'; expected a whole number"),
        ({"ids": "x"}, "ids is 'x'; expected a whole number or a list"),
        ({"other": 1}, "other is no field"),
        ({"name": None}, "name is null; expected a text"),
    ],
)
def test_mismatches_name_the_field(change, words):
    with pytest.raises(Mismatch, match=words):
        conform(Record, {"name": "a", "inner": {}, **change})


def test_what_is_missing_is_named():
    with pytest.raises(Mismatch, match="r.inner is missing"):
        conform(Record, {"name": "a"}, "r")
