"""The one step: any mix of sequences, the logits that were asked for, all or nothing."""

from __future__ import annotations

import numpy as np
import pytest

import amx_tvm.runtime
from amx_tvm.errors import GenerationError

TOLERANCE = 2e-4  # see test_runtime_engine.py


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(2).integers(1, 300, 60).tolist()


def test_a_mix_of_prompts_decoding_and_scoring(engine, ids):
    """A chunk without logits, a decoded token, a scored tail and a whole prompt in one step."""
    expected = engine.logits(ids)
    model, made = engine._model, [engine.sequence() for _ in range(4)]
    cache, handles = made[0]._cache, [sequence.handle for sequence in made]
    made[1].append(ids[:20])
    made[2].append(ids[:3])
    parts = [ids[:7], ids[20:21], ids[3:10], ids[:5]]
    wanted = [0, 1, 4, 1]
    tokens = [token for part in parts for token in part]
    rows = model.forward(cache, handles, [len(part) for part in parts], tokens, wanted)
    assert rows.shape == (6, 300) and rows.dtype == np.float32
    assert np.abs(rows - expected[[20, 6, 7, 8, 9, 4]]).max() < TOLERANCE
    assert [cache.length(handle) for handle in handles] == [7, 21, 10, 5]
    rows = model.forward(cache, handles[:1], [2], ids[7:9], [0])
    assert rows.shape == (0, 300)
    for sequence in made:
        sequence.close()


def test_within_a_prompt_no_logits_are_computed(engine, ids, monkeypatch):
    model, picked = engine._model, []
    put = model._picks.put

    def noted(rows):
        picked.append(len(rows))
        return put(rows)

    monkeypatch.setattr(model._picks, "put", noted)
    expected = engine.logits(ids[:30])
    picked.clear()
    with engine.sequence() as sequence:
        cache, handle, done = sequence._cache, sequence.handle, 0
        for count, wanted in ((3, 0), (20, 0), (7, 1)):
            given = ids[done : done + count]
            rows = model.forward(cache, [handle], [count], given, [wanted])
            done += count
    assert picked == [0, 0, 1]
    assert np.abs(rows[0] - expected[-1]).max() < TOLERANCE


def test_a_step_that_fails_leaves_every_sequence_as_it_was(artifact, ids):
    engine = amx_tvm.runtime.load(artifact, kv_tokens=32)  # of 16 tokens each, and one page more
    made = [engine.sequence() for _ in range(2)]
    cache, handles = made[0]._cache, [sequence.handle for sequence in made]
    free = cache.available_pages()
    with pytest.raises(GenerationError, match="KV cache is full"):
        engine._model.forward(cache, handles, [20, 30], ids[:50], [1, 1])
    assert cache.available_pages() == free
    assert [cache.length(handle) for handle in handles] == [0, 0]
    made[0].append(ids[:20])


def test_buffers_of_prompts_of_all_lengths_are_not_kept(engine, ids, monkeypatch):
    """TVM's allocator keeps what it has given once, apart for each number of rows."""
    model, released = engine._model, []
    release = model._machine.release
    monkeypatch.setattr(model._machine, "release", lambda: (released.append(1), release()))
    expected = engine.logits(ids[: model.chunk])
    for length in [*range(17, model.chunk + 1), *range(17, model.chunk + 1)]:
        with engine.sequence() as sequence:
            row = sequence.append(ids[:length])
        assert np.abs(row - expected[length - 1]).max() < TOLERANCE
        assert sum(model._pooled) <= 2 * model.chunk
    assert 2 * (32 - 17) // 4 <= len(released) <= 32
