"""Weights in huge pages: the same bytes, aligned, and only where there is room."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

import amx_tvm.runtime
from amx_tvm.artifact import Manifest, memory, open_parameters
from amx_tvm.errors import ArtifactError
from amx_tvm.runtime import budget


@pytest.mark.parametrize("size", [1, 4096, (2 << 20) - 1, (2 << 20) + 7, (17 << 20) + 3])
def test_read_returns_the_file(tmp_path, size):
    data = np.random.default_rng(size).integers(0, 255, size, dtype=np.uint8)
    file = tmp_path / "shard.bin"
    file.write_bytes(data.tobytes())
    read = memory.read_to_huge_pages(file)
    np.testing.assert_array_equal(read, data)
    assert read.ctypes.data % memory.HUGE_PAGE == 0 and read.flags.writeable


def test_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    file = tmp_path / "shard.bin"
    file.write_bytes(bytes(1000))
    monkeypatch.setattr(memory.os.path, "getsize", lambda _: 2000)
    with pytest.raises(OSError, match="ended at byte 1000"):
        memory.read_to_huge_pages(file)


def test_both_ways_hold_the_same_tensors(artifact):
    parameters = Manifest.load(artifact).parameters
    mapped = open_parameters(artifact, parameters)
    copied = open_parameters(artifact, parameters, huge_pages=True)
    assert list(mapped) == list(copied)
    for name, array in mapped.items():
        np.testing.assert_array_equal(array, copied[name])
        assert copied[name].dtype == array.dtype and copied[name].ctypes.data % 64 == 0


@pytest.mark.parametrize("choice", ["map", "huge"])
def test_engine_computes_the_same(artifact, engine, choice):
    other = amx_tvm.runtime.load(artifact, memory=choice)
    np.testing.assert_array_equal(other.logits([5, 6, 7]), engine.logits([5, 6, 7]))


def test_unknown_choice(artifact):
    with pytest.raises(ArtifactError, match="'auto', 'map' or 'huge'"):
        amx_tvm.runtime.load(artifact, memory="big")


def test_huge_pages_only_with_room(monkeypatch, tmp_path):
    switch = tmp_path / "enabled"
    monkeypatch.setattr(memory, "_SWITCH", switch)
    assert not memory.huge_pages_fit(1)  # no such file: a kernel without them
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    switch.write_text("always [madvise] never\n")
    assert memory.huge_pages_fit(500) and not memory.huge_pages_fit(501)
    switch.write_text("always madvise [never]\n")
    assert not memory.huge_pages_fit(1)
    switch.write_text("[always] madvise never\n")
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    assert not memory.huge_pages_fit(1)


def test_available_memory():
    found = memory.available_memory()
    assert found is None or 0 < found < 1 << 50


def test_batch_stays_inside_a_memory_limit(artifact):
    """A limit fixes the cache; a batch that wants more runs in turns."""
    prompts = [list(range(start, start + 60)) for start in range(1, 200, 20)]
    free = amx_tvm.runtime.load(artifact)
    expected = [result.token_ids for result in free.generate_batch(prompts, 8, ignore_eos=True)]
    assert free._cache.max_tokens > free.context_length
    limit = budget.resident_bytes() + (512 << 20)
    limited = amx_tvm.runtime.load(artifact, max_memory=limit)
    results = limited.generate_batch(prompts, 8, ignore_eos=True)
    assert limited._cache.max_tokens == limited.context_length
    assert [result.token_ids for result in results] == expected


def flags_at(array):
    """Return the flags of the mapping that an array lies in."""
    with open("/proc/self/smaps", encoding="ascii") as file:
        inside = False
        for line in file:
            place = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if place:
                inside = int(place[1], 16) <= array.ctypes.data < int(place[2], 16)
            elif inside and line.startswith("VmFlags:"):
                return line.split()[1:]
    raise AssertionError("no mapping holds it")


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has none")
def test_what_is_made_asks_for_huge_pages():
    def area(size):  # NumPy's own memory asks for them by itself
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return np.frombuffer(mmap.mmap(-1, size, flags=private), np.uint8)

    before = area(64 << 20)
    made = memory.made_in_huge_pages(area, 64 << 20)
    small = memory.made_in_huge_pages(area, 1 << 20)
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel was built without them")
    assert "hg" in flags_at(made[made.size // 2 :])
    assert "hg" not in flags_at(before[before.size // 2 :])
    assert small.size == 1 << 20
