"""Requests that share their steps: the same texts, pages that come back, faults that stay alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

import amx_tvm.runtime
from amx_tvm.errors import GenerationError
from amx_tvm.runtime.sampler import NothingAllowed

PAGE = 16


@pytest.fixture(scope="module")
def engine(artifact):
    """One with a cache for all of a test's requests, so that nothing has to give way."""
    return amx_tvm.runtime.load(artifact, kv_tokens=2048)


def prompts(count, seed=0, longest=60):
    random = np.random.default_rng(seed)
    return [random.integers(1, 300, random.integers(1, longest)).tolist() for _ in range(count)]


def free_pages(engine):
    return engine.call(lambda: engine._reserve(engine._kv_tokens).available_tokens() // PAGE)


def turn(scheduler, most=10_000):
    """Step to the end and return the number of steps."""
    for step in range(most):
        if not scheduler.step():
            return step
    raise AssertionError("the scheduler does not come to an end")


@pytest.mark.parametrize("prefill_rows", [None, 7])
def test_every_request_has_its_own_options(engine, prefill_rows):
    """Texts of a batch equal those of each alone: prompts of any length, joining at any time."""
    options = [
        {"max_new_tokens": 12},
        {"max_new_tokens": 20, "temperature": 1.3, "top_k": 40, "seed": 3},
        {"max_new_tokens": 5, "repetition_penalty": 1.4},
        {"max_new_tokens": 16, "frequency_penalty": 5.0, "presence_penalty": 2.0},
        {"max_new_tokens": 9, "logit_bias": {"77": 100}, "min_tokens": 4},
    ]
    asked = [engine.request(p, **o) for p, o in zip(prompts(5), options, strict=True)]
    alone = [
        engine.generate(request.prompt, **o) for request, o in zip(asked, options, strict=True)
    ]
    with engine.scheduler(prefill_rows=prefill_rows) as scheduler:
        handles = [scheduler.add(request) for request in asked[:2]]
        scheduler.step()
        handles += [scheduler.add(request) for request in asked[2:]]
        turn(scheduler)
    for handle, expected in zip(handles, alone, strict=True):
        assert handle.finished and handle.result.token_ids == expected.token_ids
        assert handle.result.text == expected.text
        assert handle.result.finish_reason == expected.finish_reason
    assert engine._cache.sequences == 0


def test_callbacks_tell_tokens_text_and_end(engine):
    told = {"tokens": [], "text": "", "end": []}

    def text(piece):
        told["text"] += piece

    request = replace(
        engine.request("the cat", max_new_tokens=10, ignore_eos=True),
        on_tokens=told["tokens"].extend,
        on_text=text,
        on_finish=told["end"].append,
    )
    with engine.scheduler() as scheduler:
        handle = scheduler.add(request)
        turn(scheduler)
    assert told["tokens"] == handle.result.token_ids and len(told["tokens"]) == 10
    assert told["text"] == handle.result.text and told["end"] == [handle.result]


def test_a_long_prompt_does_not_stop_those_that_decode(engine):
    with engine.scheduler(prefill_rows=4) as scheduler:
        first = scheduler.add(engine.request([5, 6], max_new_tokens=60, ignore_eos=True))
        scheduler.step()
        long = list(range(1, 121))
        second = scheduler.add(engine.request(long, max_new_tokens=3, ignore_eos=True))
        steps, made = 0, len(first.result.token_ids)
        while not second.result.token_ids:
            scheduler.step()
            steps += 1
            new = len(first.result.token_ids) - made
            assert new in (steps // 2, (steps + 1) // 2)  # a token for each chunk
        assert new >= 120 / 4 - 1
        turn(scheduler)
    assert second.result.token_ids == engine.generate(long, 3, ignore_eos=True).token_ids


def test_steps_of_others_run_within_a_chunk(engine):
    """Between all of its kernels; whose pages are whose shows where some of the others end."""
    lengths, few = (60, 9, 12, 30), prompts(4, seed=8)
    long, steps = [list(range(1 + i, 121 + i)) for i in range(2)], []
    before = free_pages(engine)
    with engine.scheduler() as scheduler:
        handles = [
            scheduler.add(engine.request(p, max_new_tokens=n, ignore_eos=True))
            for p, n in zip(few, lengths, strict=True)
        ]
        while not all(handle.result.token_ids for handle in handles):
            scheduler.step()
        scheduler.turns.between = lambda step: steps.append(step())
        late = [scheduler.add(engine.request(p, max_new_tokens=5)) for p in long]
        while not late[1].result.token_ids:
            scheduler.step()
        turn(scheduler)
    assert steps[0] == 4 and steps[-1] < 4 and len(steps) > 10
    for handle, prompt in zip([*handles, *late], [*few, *long], strict=True):
        expected = engine.generate(prompt, len(handle.result.token_ids), ignore_eos=True)
        assert handle.result.token_ids == expected.token_ids
    assert free_pages(engine) == before


def test_a_chunk_keeps_its_pages_where_others_lack_some(artifact):
    """Nobody gives way within it: its own request would be the first."""
    engine = amx_tvm.runtime.load(artifact, kv_tokens=10 * PAGE)
    steps = []
    with engine.scheduler() as scheduler:
        first = scheduler.add(engine.request([5, 6], max_new_tokens=40, ignore_eos=True))
        while len(first.result.token_ids) < PAGE - 3:
            scheduler.step()
        scheduler.turns.between = lambda step: steps.append(step())
        late = scheduler.add(engine.request(list(range(1, 9 * PAGE)), max_new_tokens=2))
        turn(scheduler)
    assert 0 in steps
    assert first.result.token_ids == engine.generate([5, 6], 40, ignore_eos=True).token_ids
    assert late.result.token_ids == engine.generate(list(range(1, 9 * PAGE)), 2).token_ids


def test_a_common_beginning_is_computed_and_stored_once(engine):
    common = list(range(1, 97))  # six pages
    with engine.scheduler() as scheduler:
        before = free_pages(engine)
        handles = [
            scheduler.add(engine.request([*common, 100 + i], max_new_tokens=8, ignore_eos=True))
            for i in range(6)
        ]
        while not all(handle.result.token_ids for handle in handles):
            scheduler.step()
        assert before - free_pages(engine) <= 6 + 6
        assert [h.result.timings.prefill_tokens for h in handles] == [97, 1, 1, 1, 1, 1]
        turn(scheduler)
    for i, handle in enumerate(handles):
        expected = engine.generate([*common, 100 + i], 8, ignore_eos=True)
        assert handle.result.token_ids == expected.token_ids
    assert free_pages(engine) == before


def test_a_few_common_tokens_are_no_fork(engine):
    with engine.scheduler() as scheduler:
        handles = [
            scheduler.add(engine.request([1, 2, 3, *range(9 + i, 40)], max_new_tokens=2))
            for i in range(3)
        ]
        turn(scheduler)
    assert [h.result.timings.prefill_tokens for h in handles] == [34, 33, 32]


def test_who_started_last_gives_way_and_comes_back(artifact, engine):
    """Six requests of up to five pages each in a cache of nine: nothing fails, nothing changes."""
    small = amx_tvm.runtime.load(artifact, kv_tokens=8 * PAGE)
    asked = [list(range(10 * i + 1, 10 * i + 21)) for i in range(6)]
    gave = []
    with small.scheduler() as scheduler:
        release = scheduler._release
        scheduler._release = lambda handle: (gave.append(handle.finished), release(handle))
        before = free_pages(small)
        handles = [
            scheduler.add(small.request(p, max_new_tokens=60, ignore_eos=True)) for p in asked
        ]
        turn(scheduler)
    assert False in gave  # pages did run out
    for prompt, handle in zip(asked, handles, strict=True):
        expected = engine.generate(prompt, 60, ignore_eos=True)
        assert handle.result.token_ids == expected.token_ids
        assert handle.result.text == expected.text and handle.result.finish_reason == "length"
    assert free_pages(small) == before


@pytest.mark.parametrize("held", [0, 3])
def test_a_small_cache_ends_an_answer_with_length(artifact, engine, held):
    """With and without a sequence of the caller's beside it."""
    small = amx_tvm.runtime.load(artifact, kv_tokens=4 * PAGE)
    prompt = list(range(1, 31))
    with small.sequence() as sequence:
        if held:
            sequence.append([1] * held)
        stream = small.stream(prompt, 200, ignore_eos=True)
        pieces = list(stream)
        result = stream.result
        batch = small.generate_batch([prompt], 200, ignore_eos=True)[0]
    room = (5 - (held > 0)) * PAGE  # TVM adds a page
    assert result.finish_reason == batch.finish_reason == "length"
    assert len(result.token_ids) == room - len(prompt) + 1
    expected = engine.generate(prompt, len(result.token_ids), ignore_eos=True)
    assert result.token_ids == batch.token_ids == expected.token_ids
    assert "".join(pieces) == result.text == expected.text
    with pytest.raises(GenerationError, match=r"65 tokens, the KV cache holds 64"):
        small.generate([1] * 65)
    assert small._cache.sequences == 0


def test_cancelled_at_random_steps_every_page_comes_back(engine):
    random = np.random.default_rng(5)
    before = free_pages(engine)
    for round_ in range(30):
        asked = prompts(random.integers(1, 6), seed=round_)
        with engine.scheduler(prefill_rows=[None, 5][round_ % 2]) as scheduler:
            handles = [
                scheduler.add(engine.request(p, max_new_tokens=12, ignore_eos=True)) for p in asked
            ]
            left = handles[random.integers(len(handles))]
            for _ in range(random.integers(0, 14)):
                scheduler.step()
            scheduler.cancel(left)
            scheduler.cancel(left)
            assert left.finished
            if round_ % 3:
                turn(scheduler)
                for handle in handles:
                    if handle is not left:
                        assert handle.result.finish_reason == "length"
        assert all(handle.finished for handle in handles)
        assert free_pages(engine) == before and engine._cache.sequences == 0


def test_a_callback_may_cancel_others(engine):
    expected = engine.generate([7, 8], 6, ignore_eos=True).token_ids
    with engine.scheduler() as scheduler:
        handles = []
        first = engine.request([5, 6], max_new_tokens=6, ignore_eos=True)
        handles.append(
            scheduler.add(replace(first, on_tokens=lambda _: scheduler.cancel(handles[1])))
        )
        for prompt in ([1, 2, 3], [7, 8]):
            request = engine.request(prompt, max_new_tokens=6, ignore_eos=True)
            handles.append(scheduler.add(request))
        turn(scheduler)
    reasons = [handle.result.finish_reason for handle in handles]
    assert reasons == ["length", "cancelled", "length"]
    assert handles[2].result.token_ids == expected and engine._cache.sequences == 0


def test_a_fault_fails_the_request_that_caused_it(engine, monkeypatch):
    """A sampler, a callback, a step of the model: the others do not notice."""
    asked = [[5, 6, 7], [8, 9, 299], [10, 11], [12]]
    expected = [engine.generate(p, 8, ignore_eos=True).token_ids for p in asked]
    forward, bad = engine._model.forward, 299

    def broken(cache, sequences, lengths, tokens, *wanted):
        if bad in tokens:
            raise ValueError("an illegal step")
        return forward(cache, sequences, lengths, tokens, *wanted)

    def complain(tokens):
        raise KeyError("a callback")

    errors = []
    requests = [
        replace(engine.request(p, max_new_tokens=8, ignore_eos=True), on_error=errors.append)
        for p in asked
    ]
    requests[2] = replace(requests[2], on_tokens=complain)
    requests[3] = replace(requests[3], mask=lambda made: np.zeros(300, bool) if made else None)
    assert all(bad not in ids for ids in expected)
    monkeypatch.setattr(engine._model, "forward", broken)
    with engine.scheduler() as scheduler:
        handles = [scheduler.add(request) for request in requests]
        turn(scheduler)
    assert [h.result.finish_reason for h in handles] == ["length", "error", "error", "error"]
    assert handles[0].result.token_ids == expected[0]
    assert {type(error) for error in errors} == {ValueError, KeyError, NothingAllowed}
    assert engine._cache.sequences == 0


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()], ids=repr)
def test_what_a_callback_raises_ends_its_request_alone(engine, error):
    """Also what is no Exception: on the engine's thread it is nobody's else."""

    def leave(_):
        raise error

    errors, expected = [], engine.generate([7, 8], 6, ignore_eos=True).token_ids
    request = engine.request([5, 6], max_new_tokens=6, ignore_eos=True)
    with engine.scheduler() as scheduler:
        left = scheduler.add(replace(request, on_tokens=leave, on_error=errors.append))
        late = scheduler.add(replace(request, on_finish=leave))
        other = scheduler.add(engine.request([7, 8], max_new_tokens=6, ignore_eos=True))
        turn(scheduler)
    [found] = errors
    assert isinstance(found, GenerationError) and type(error).__name__ in str(found)
    assert left.result.finish_reason == "error" and late.result.finish_reason == "length"
    assert other.result.token_ids == expected and engine._cache.sequences == 0


@pytest.mark.parametrize(
    "mask", [np.ones(3, bool), np.ones(300), np.ones((300, 1), bool), "x"], ids=str
)
def test_masks_that_are_none(engine, mask):
    with pytest.raises(GenerationError, match=r"the mask is .*expected bool \[300\]"):
        engine.generate([1, 2], 3, mask=lambda made: mask)
    with pytest.raises(GenerationError, match="expected a callable"):
        engine.generate([1, 2], 3, mask=mask)


def test_a_mask_decides_what_may_come(engine):
    def mask(made):
        allowed = np.zeros(300, bool)
        allowed[[10 + len(made), 200]] = True
        return allowed

    request = replace(
        engine.request([1, 2, 3], max_new_tokens=6, logit_bias={200: -100}), mask=mask
    )
    with engine.scheduler() as scheduler:
        handle = scheduler.add(request)
        turn(scheduler)
    assert handle.result.token_ids == [10, 11, 12, 13, 14, 15]


def test_a_sequence_of_the_callers_is_kept_and_not_shared(engine):
    with engine.sequence() as sequence:
        with engine.scheduler() as scheduler:
            scheduler.add(engine.request([5, 6, 7], sequence=sequence))
            scheduler.step()
            with pytest.raises(GenerationError, match="at work on this sequence"):
                engine.generate([5, 6, 7], 3, sequence=sequence)
            with pytest.raises(GenerationError, match="at work on this sequence"):
                sequence.rollback(1)
        assert sequence.tokens[:3] == [5, 6, 7]
        again = engine.generate([5, 6, 7], 3, ignore_eos=True, sequence=sequence)
        assert again.timings.prefill_tokens == 1
    with pytest.raises(GenerationError, match="closed"):
        engine.generate([5, 6, 7], 3, sequence=sequence)
    other = "expected one that engine.sequence"
    with pytest.raises(GenerationError, match=other):
        engine.generate([5, 6, 7], 3, sequence=7)


def test_more_answers_at_once_than_rows_of_a_chunk(artifact, monkeypatch):
    engine = amx_tvm.runtime.load(artifact, max_sequences=40, kv_tokens=40 * 32)
    forward, rows = engine._model.forward, []

    def noted(cache, sequences, *arguments):
        logits = forward(cache, sequences, *arguments)
        rows.append(len(sequences))
        return logits

    monkeypatch.setattr(engine._model, "forward", noted)
    prompts = [[token, 9, token] for token in range(20, 60)]
    batch = engine.generate_batch(prompts, max_new_tokens=12, ignore_eos=True)
    assert max(rows) == 40 > engine._model.chunk
    for prompt, result in list(zip(prompts, batch, strict=True))[::13]:
        assert result.token_ids == engine.generate(prompt, 12, ignore_eos=True).token_ids
