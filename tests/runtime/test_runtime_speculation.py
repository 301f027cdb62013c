"""Drafts of repeated text: found, worth it or not, and without effect on what comes out."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

import amx_tvm.runtime
from amx_tvm.errors import GenerationError
from amx_tvm.runtime.lookup import Lookup
from amx_tvm.runtime.speculation import Cost, Speculation

PROMPT = [5, 9, 13, 21, 34, 55]
OPTIONS = [
    {},
    {"temperature": 1.0, "seed": 3, "top_k": 5},
    {"repetition_penalty": 1.2, "min_tokens": 20},
    {"temperature": 0.3, "seed": 1, "logprobs": 2},
]


class Cheap(Cost):
    """More rows cost next to nothing: everything that is found is verified."""

    def seconds(self, rows):
        return 1.0 + 1e-6 * rows


@pytest.fixture(scope="module")
def plain(artifact):
    return amx_tvm.runtime.load(artifact, kv_tokens=2048)


@pytest.fixture
def drafting(artifact):
    engine = amx_tvm.runtime.load(artifact, kv_tokens=2048, speculation=True)
    engine.speculation.cost = Cheap()
    return engine


def test_the_longest_match_is_found():
    text = [1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3]
    lookup = Lookup(text)
    lookup.update()
    assert lookup.repeated() == (3, 3)
    assert lookup.following(3, 4) == [4, 9, 2, 3]
    text.append(7)
    lookup.update()
    assert lookup.repeated() == (3, 8)  # 2 3 7
    assert lookup.match([8, 9, 2]) == (2, 6)
    assert lookup.match([4, 4]) == (0, 0) == lookup.match([4])
    assert Lookup([]).repeated() == (0, 0)
    turning = Lookup([1, 2, 1, 2, 1, 2])
    turning.update()
    assert turning.following(turning.repeated()[1], 5) == [1, 2, 1, 2, 1]


def test_pairs_of_one_hash_are_told_apart():
    text = np.random.default_rng(0).integers(0, 3, 40).tolist()
    lookup = Lookup(text[:2], room=2)
    for token in text[2:]:
        lookup.tokens.append(token)
        lookup.update()
        seen = lookup.tokens
        length, behind = lookup.repeated()
        assert seen[behind - length : behind] == seen[len(seen) - length :]
        assert bool(length) == any(seen[i : i + 2] == seen[-2:] for i in range(len(seen) - 2))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_tokens_with_and_without(plain, drafting, options):
    options = {"ignore_eos": True, **options}
    expected = plain.generate(PROMPT, 60, **options)
    for _ in range(2):  # the second time its own past answer is the draft
        found = drafting.generate(PROMPT, 60, **options)
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
        assert found.finish_reason == expected.finish_reason
        assert [e.token for e in found.logprobs] == [e.token for e in expected.logprobs]
    speculation = drafting.speculation
    assert speculation.accepted > 0.5 * len(expected.token_ids)
    assert speculation.steps < len(expected.token_ids)
    assert drafting._cache.sequences == 0


def test_several_share_steps_with_drafts(plain, drafting):
    prompts = [[*PROMPT, i] for i in range(1, 6)]
    expected = [r.token_ids for r in plain.generate_batch(prompts, 40, ignore_eos=True)]
    for _ in range(2):
        found = drafting.generate_batch(prompts, 40, ignore_eos=True)
        assert [r.token_ids for r in found] == expected
    assert drafting.speculation.accepted > 40


def test_ends_within_a_draft(plain, drafting):
    """A stop in the middle, and a sequence that is kept: it holds no token that was not chosen."""
    whole = plain.generate(PROMPT, 40, ignore_eos=True).token_ids
    drafting.generate(PROMPT, 40, ignore_eos=True)
    stop = next(t for i, t in enumerate(whole) if i > 10 and t not in whole[:i])
    with drafting.sequence() as sequence:
        found = drafting.generate(
            PROMPT, 40, stop_token_ids=[stop], sequence=sequence, ignore_eos=True
        )
        assert found.token_ids == whole[: whole.index(stop) + 1]
        assert sequence.tokens == PROMPT + found.token_ids[:-1]
        assert np.allclose(
            sequence.append(found.token_ids[-1:]),
            plain.logits(PROMPT + found.token_ids)[-1],
            atol=1e-4,
        )
    assert drafting.speculation.accepted > 5
    short = drafting.generate(PROMPT, 7, ignore_eos=True)
    assert short.token_ids == whole[:7]


def test_a_callback_cancels_within_a_draft(drafting):
    drafting.generate(PROMPT, 40, ignore_eos=True)
    ended = []

    def tokens(_):
        if len(handle.result.token_ids) == 12:
            scheduler.cancel(handle)

    with drafting.scheduler() as scheduler:
        request = drafting.request(PROMPT, max_new_tokens=40, ignore_eos=True)
        handle = scheduler.add(replace(request, on_tokens=tokens, on_finish=ended.append))
        while scheduler.step():
            pass
    assert len(handle.result.token_ids) == 12 and len(ended) == 1
    assert drafting._cache.sequences == 0


def test_a_full_cache_takes_no_drafts(plain, artifact):
    small = amx_tvm.runtime.load(artifact, kv_tokens=64, speculation=True)
    small.speculation.cost = Cheap()
    expected = plain.generate(PROMPT, 50, ignore_eos=True).token_ids
    for _ in range(2):
        assert small.generate(PROMPT, 50, ignore_eos=True).token_ids == expected
        filled = small.generate(PROMPT, 200, ignore_eos=True)
        assert filled.token_ids[:50] == expected and filled.finish_reason == "length"


def test_drafts_stop_where_they_do_not_pay(plain, artifact):
    engine = amx_tvm.runtime.load(artifact, kv_tokens=2048, speculation=True)

    class Dear(Cost):
        def seconds(self, rows):
            return float(rows)

    engine.speculation.cost = Dear()
    for _ in range(2):
        engine.generate(PROMPT, 40, ignore_eos=True)
    assert engine.speculation.drafted == 0
    engine.speculation.cost = Cheap()
    engine.speculation._rates[:] = [0.05] * 7  # nothing came true lately
    engine.generate([7, 7, 7], 6, ignore_eos=True)
    assert engine.speculation.drafted == 0


def test_a_past_answer_is_its_owners(drafting):
    def run(salt):
        with drafting.scheduler() as scheduler:
            request = drafting.request(PROMPT, max_new_tokens=40, ignore_eos=True)
            scheduler.add(replace(request, salt=salt))
            while scheduler.step():
                pass
        return drafting.speculation.accepted

    first = run("me")
    assert run("you") - first <= first  # as little as without a past
    mine = drafting.speculation.accepted
    assert run("me") - mine > 30


def test_cost_follows_what_steps_took():
    cost = Cost()
    assert cost.seconds(1) == 1.0 < cost.seconds(2) < cost.seconds(16)
    for _ in range(100):
        cost.observe(1, 0.01)
        cost.observe(9, 0.09)
    assert cost.seconds(1) == pytest.approx(0.01, rel=0.2)
    assert cost.seconds(9) == pytest.approx(0.09, rel=0.2)
    cost.observe(9, 60.0)
    assert cost.seconds(9) < 0.2


def test_acceptance_is_measured_without_drafts(artifact):
    engine = amx_tvm.runtime.load(artifact, kv_tokens=2048, speculation=True)
    speculation = engine.speculation
    speculation.cost.observe(1, 1e-9)  # no draft is ever worth it
    speculation.cost.observe = lambda *_: None
    speculation.cost.seconds = lambda rows: float(rows)
    before = list(speculation._rates)
    for _ in range(2):
        engine.generate(PROMPT, 60, ignore_eos=True)
    assert speculation.drafted == 0 and speculation._rates[-1] > before[-1]


def test_past_answers_are_bounded(plain):
    speculation = Speculation()
    with plain.scheduler() as scheduler:
        handle = scheduler.add(plain.request(PROMPT, max_new_tokens=2))
        while scheduler.step():
            pass
    handle.tokens = list(range(1000))
    for owner in range(100):
        handle.request = replace(handle.request, salt=str(owner))
        speculation.remember(handle)
    assert len(speculation._past) == 64
    for _ in range(200):
        speculation.remember(handle)
    assert sum(len(lookup.tokens) for lookup in speculation._past["99"]) <= 1 << 15


def test_past_answers_take_little_memory(plain):
    speculation = Speculation()
    with plain.scheduler() as scheduler:
        handle = scheduler.add(plain.request(PROMPT, max_new_tokens=2))
        while scheduler.step():
            pass
    tokens = np.random.default_rng(0).integers(1000, 40000, (400, 100)).tolist()
    tracemalloc.start()
    try:
        for handle.tokens in tokens:
            speculation.remember(handle)
        del tokens
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 1 << 19  # for the 32768 tokens of one owner


def test_the_option_is_checked(artifact):
    with pytest.raises(GenerationError, match="speculation is 3, expected true or false"):
        amx_tvm.runtime.load(artifact, speculation=3)
