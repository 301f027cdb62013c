"""The runtime on what the project's own compiler makes: its kernels, its KV cache, its buckets."""

from __future__ import annotations

import numpy as np
import pytest

import amx_tvm


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    from tiny_model import write_model

    place = tmp_path_factory.mktemp("compiled")
    return amx_tvm.compile(write_model(place / "model"), output=place / "artifact", strict=True)


@pytest.fixture(scope="module")
def engine(compiled):
    return amx_tvm.load(compiled.path, kv_tokens=4096)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(3).integers(1, 300, 700).tolist()


@pytest.fixture(scope="module")
def expected(engine, ids):
    return engine.logits(ids)


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_chunks_and_decode_equal_one_pass(engine, ids, expected):
    with engine.sequence() as sequence:
        for start, end in ((0, 1), (1, 3), (3, 100), (100, 101), (101, 690)):
            assert error(sequence.append(ids[start:end]), expected[end - 1]) < 1e-5
        for index in range(690, 700):
            assert error(sequence.append([ids[index]]), expected[index]) < 1e-5


def test_prefill_longer_than_a_chunk(engine, ids, expected):
    with engine.sequence() as sequence:
        assert error(sequence.append(ids), expected[-1]) < 1e-5


@pytest.mark.parametrize("position", [1, 15, 16, 17, 333])
def test_fork_and_rollback(engine, ids, expected, position):
    with engine.sequence() as parent:
        parent.append(ids[:400])
        with parent.fork(position) as child:
            child.append([5] * 40)
            child.rollback(40)
            assert error(child.append(ids[position:500]), expected[499]) < 1e-5
        parent.rollback(400 - position)
        assert error(parent.append(ids[position:420]), expected[419]) < 1e-5


def test_batch_equals_single(engine):
    prompts = ["the quick brown", "the cat", [5, 6, 7], "dog", "the quick brown fox", "jumps"]
    batch = engine.generate_batch(prompts, max_new_tokens=20)
    for prompt, result in zip(prompts, batch, strict=True):
        assert engine.generate(prompt, max_new_tokens=20).token_ids == result.token_ids


@pytest.mark.parametrize(("prefill_rows", "kv_tokens"), [(None, 4096), (20, 4096), (20, 192)])
def test_texts_of_a_scheduler_equal_single_ones(compiled, engine, prefill_rows, kv_tokens):
    """In strict mode, however prompts are cut and mixed, and with requests that give way."""
    random = np.random.default_rng(prefill_rows or 0)
    asked = [random.integers(1, 300, random.integers(1, 90)).tolist() for _ in range(9)]
    asked.append([*asked[0], 5, 6, 7])
    options = {"max_new_tokens": 30, "ignore_eos": True}
    expected = [engine.generate(prompt, **options) for prompt in asked]
    other = amx_tvm.load(compiled.path, kv_tokens=kv_tokens)
    with other.scheduler(prefill_rows=prefill_rows) as scheduler:
        handles = []
        for prompt in asked:
            handles.append(scheduler.add(other.request(prompt, **options)))
            for _ in range(random.integers(4)):
                scheduler.step()
        while scheduler.step():
            pass
    for handle, alone in zip(handles, expected, strict=True):
        assert handle.result.token_ids == alone.token_ids and handle.result.text == alone.text
    assert other._cache.sequences == 0


def test_drafts_change_nothing(compiled, engine):
    """In strict mode, rows of one sequence in one step are those of a step each."""
    drafting = amx_tvm.load(compiled.path, kv_tokens=4096, speculation=True)
    drafting.speculation.cost.seconds = lambda rows: 1.0 + 1e-6 * rows
    for options in ({}, {"temperature": 1.0, "seed": 5}, {"frequency_penalty": 0.5}):
        for prompt in ([5, 6, 7] * 9, "the cat and the dog"):
            expected = engine.generate(prompt, max_new_tokens=80, ignore_eos=True, **options)
            for _ in range(2):
                found = drafting.generate(prompt, max_new_tokens=80, ignore_eos=True, **options)
                assert found.token_ids == expected.token_ids and found.text == expected.text
    assert drafting.speculation.accepted > 300
