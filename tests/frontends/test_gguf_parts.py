"""Split GGUF models: by gguf-split's names, renamed, as directories, and with parts missing."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm.frontends import open_model

from .test_gguf import fails, tiny_tensors, write_gguf


@pytest.fixture
def tiny():
    return tiny_tensors()


NAMES = tuple(f"a-0000{number}-of-00003" for number in (1, 2, 3))


def parts_of(tmp_path, tiny, names=NAMES):
    """Write a model in three parts; the later ones have no keys but those about the split."""
    held = list(tiny)
    for number, (name, part) in enumerate(zip(names, (held[:2], held[2:3], held[3:]), strict=True)):
        path = tmp_path / f"{name}.gguf"
        skip = () if number == 0 else ("block_count", "context_length")
        write_gguf(path, {key: tiny[key] for key in part}, split=(number, 3, 5), skip=skip)
    return [tmp_path / f"{name}.gguf" for name in names]


def equal_models(source, whole):
    assert sorted(source.names()) == sorted(whole.names())
    for name in whole.names():
        np.testing.assert_array_equal(source.load(name), whole.load(name))


RENAMED = ("first", "other.part", "a-00002-of-00009")


@pytest.mark.parametrize("names", [None, RENAMED])
def test_parts_of_a_split_model(tmp_path, tiny, names):
    whole = open_model(write_gguf(tmp_path / "whole.gguf", tiny))
    place = tmp_path / "parts"
    place.mkdir()
    paths = parts_of(place, tiny, **({"names": names} if names else {}))
    equal_models(open_model(paths[0]), whole)
    equal_models(open_model(place), whole)


def test_a_part_that_is_missing_or_of_another_model(tmp_path, tiny):
    paths = parts_of(tmp_path, tiny)
    paths[1].unlink()
    fails(paths[0], paths[1].name, "missing")
    fails(tmp_path, paths[1].name, "missing")
    paths[0].rename(tmp_path / "first.gguf")
    fails(tmp_path / "first.gguf", "part 2", "split", "none")
    tiny["extra.weight"] = tiny["output_norm.weight"]
    write_gguf(paths[1], {"extra.weight": tiny["extra.weight"]}, split=(0, 3, 5))
    (tmp_path / "first.gguf").rename(paths[0])
    fails(paths[0], paths[1].name, "part 1")


def test_directories_with_two_models_list_them(tmp_path, tiny):
    parts_of(tmp_path, tiny)
    write_gguf(tmp_path / "whole.gguf", tiny)
    fails(tmp_path, "2 GGUF models", "a-00001-of-00003.gguf", "whole.gguf")
