"""Sequences, prefill, decode, batches and generation against a real executable."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import toy_artifact as toy

import amx_tvm.runtime
from amx_tvm.errors import ArtifactError, GenerationError, TargetError
from amx_tvm.runtime.request import Run

# Logits are about 30 in size; TVM's attention sums in another order where the chunks differ.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(1, 300, 100).tolist()


@pytest.fixture(scope="module")
def expected(engine, ids):
    """Logits [100, vocab] of one pass in chunks of 32."""
    return engine.logits(ids)


def close(a, b):
    return np.abs(a - b).max() < TOLERANCE


def test_logits_shape_and_type(expected):
    assert expected.shape == (100, 300) and expected.dtype == np.float32
    assert np.isfinite(expected).all() and expected.std() > 0.1


@pytest.mark.parametrize("cut", [1, 16, 31, 32, 33, 99])
def test_prefill_in_parts_equals_one(engine, ids, expected, cut):
    with engine.sequence() as sequence:
        assert close(sequence.append(ids[:cut]), expected[cut - 1])
        assert close(sequence.append(ids[cut:]), expected[-1])
        assert sequence.tokens == ids


def test_decode_equals_prefill(engine, ids, expected):
    with engine.sequence() as sequence:
        for index, token in enumerate(ids[:40]):
            assert close(sequence.append([token]), expected[index])


def test_order_matters(engine, ids, expected):
    swapped = [*ids[:10], ids[11], ids[10], *ids[12:]]
    assert not close(engine.logits(swapped)[-1], expected[-1])


@pytest.mark.parametrize("position", [0, 1, 16, 17, 40, None])
def test_fork_is_independent(artifact, ids, expected, position):
    engine = amx_tvm.runtime.load(artifact, kv_tokens=512)
    parent = engine.sequence()
    parent.append(ids[:40])
    child = parent.fork(position)
    start = len(child)
    assert start == (40 if position is None else position)
    other = [7] * 30
    child.append(other)
    assert close(parent.append(ids[40:]), expected[-1])
    child.rollback(30)
    assert close(child.append(ids[start:]), expected[-1])
    parent.close()
    child.rollback(1)
    assert close(child.append(ids[-1:]), expected[-1])


@pytest.mark.parametrize("count", [1, 15, 16, 50, 100])
def test_rollback(engine, ids, expected, count):
    with engine.sequence() as sequence:
        sequence.append(ids)
        sequence.rollback(count)
        assert len(sequence) == 100 - count
        assert close(sequence.append(ids[100 - count :]), expected[-1])


def test_keep_prefix_leaves_one_token(engine, ids):
    with engine.sequence() as sequence:
        sequence.append(ids[:20])
        assert sequence.keep_prefix(ids[:20]) == 19
        assert sequence.keep_prefix([*ids[:5], 299 - ids[5], 1]) == 5
        assert len(sequence) == 5


def test_failed_call_leaves_the_sequence_as_it_was(engine, ids, expected, monkeypatch):
    with engine.sequence() as sequence:
        sequence.append(ids[:32])

        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine._model._machine, "to_host", interrupted)
            with pytest.raises(KeyboardInterrupt):
                sequence.append(ids[32:40])
        assert len(sequence) == 32
        assert close(sequence.append(ids[32:]), expected[-1])


def test_generation_is_greedy_decoding(engine):
    result = engine.generate("the quick brown", max_new_tokens=12, ignore_eos=True)
    tokens = engine.encode("the quick brown")
    chosen = []
    for _ in range(12):
        chosen.append(int(engine.logits(tokens + chosen)[-1].argmax()))
    assert result.token_ids == chosen
    assert result.finish_reason == "length" and result.stopped_by is None
    timings = result.timings
    assert (timings.prefill_tokens, timings.decode_tokens) == (len(tokens), 11)
    assert 0 < timings.prefill_s <= timings.first_token_s
    assert timings.decode_tokens_per_s > 0 and timings.prefill_tokens_per_s > 0


def test_stream_pieces_join_to_the_text(engine):
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    stream = engine.stream("the cat", **options)
    pieces = list(stream)
    result = engine.generate("the cat", **options)
    assert "".join(pieces) == stream.result.text == result.text
    assert len(pieces) > 10
    tokens = engine.encode("the cat")
    assert engine.decode(tokens + result.token_ids) == "the cat" + result.text


def test_sampling_is_reproducible(engine):
    options = {"max_new_tokens": 24, "temperature": 1.5, "top_k": 50, "ignore_eos": True}
    runs = [engine.generate("the", seed=seed, **options).token_ids for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_stop_token_and_eos(engine):
    free = engine.generate("the cat", max_new_tokens=20, ignore_eos=True)
    token = free.token_ids[6]
    cut = free.token_ids.index(token)
    result = engine.generate("the cat", max_new_tokens=20, ignore_eos=True, stop_token_ids=[token])
    assert result.token_ids == free.token_ids[: cut + 1]
    assert (result.finish_reason, result.stopped_by) == ("stop", token)
    assert free.text.startswith(result.text)


def test_stop_string(engine):
    free = engine.generate("the cat", max_new_tokens=30, ignore_eos=True)
    stop = free.text[5:8]
    stream = engine.stream("the cat", max_new_tokens=30, ignore_eos=True, stop=stop)
    pieces = list(stream)
    assert "".join(pieces) == free.text[: free.text.index(stop)]
    assert (stream.result.finish_reason, stream.result.stopped_by) == ("stop", stop)


def test_stop_string_that_is_a_special_token(engine):
    request = engine.request("the cat", max_new_tokens=8, stop="<eos>", ignore_eos=True)
    run = Run(request, engine.context_length)
    assert not run.finished and run.accept(toy.EOS) == ""
    assert (run.result.finish_reason, run.result.stopped_by) == ("stop", toy.EOS)


def test_batch_equals_single(engine):
    prompts = ["the quick brown", "the cat", "dog", [5, 6, 7], "the quick brown fox jumps"]
    batch = engine.generate_batch(prompts, max_new_tokens=16, ignore_eos=True)
    for prompt, result in zip(prompts, batch, strict=True):
        alone = engine.generate(prompt, max_new_tokens=16, ignore_eos=True)
        assert result.token_ids == alone.token_ids and result.text == alone.text


def test_batch_members_end_at_different_times(engine):
    free = engine.generate("the cat", max_new_tokens=16, ignore_eos=True)
    stop = free.token_ids[3]
    prompts = ["the cat", "dog", "the quick brown"]
    batch = engine.generate_batch(
        prompts, max_new_tokens=16, ignore_eos=True, stop_token_ids=[stop]
    )
    for prompt, result in zip(prompts, batch, strict=True):
        alone = engine.generate(prompt, max_new_tokens=16, ignore_eos=True, stop_token_ids=[stop])
        assert result.token_ids == alone.token_ids
        assert result.finish_reason == alone.finish_reason
    assert len({len(result.token_ids) for result in batch}) > 1


def test_more_prompts_than_slots(artifact):
    engine = amx_tvm.runtime.load(artifact, max_sequences=3)
    prompts = [[token, 9, token] for token in range(20, 30)]
    batch = engine.generate_batch(prompts, max_new_tokens=8, ignore_eos=True)
    for prompt, result in zip(prompts, batch, strict=True):
        assert result.token_ids == engine.generate(prompt, 8, ignore_eos=True).token_ids
    assert engine._cache.sequences == 0


def test_batch_waits_for_pages_beside_a_live_sequence(artifact):
    engine = amx_tvm.runtime.load(artifact, kv_tokens=128)
    prompts = [list(range(start, start + 30)) for start in (10, 50, 90, 130)]
    alone = [engine.generate(p, max_new_tokens=12, ignore_eos=True).token_ids for p in prompts]
    with engine.sequence() as held:
        held.append([1, 2, 3])
        batch = engine.generate_batch(prompts, max_new_tokens=12, ignore_eos=True)
        assert engine._cache.max_tokens == 128
    assert [result.token_ids for result in batch] == alone


def test_batch_samples_differ_by_stream(engine):
    options = {"max_new_tokens": 16, "temperature": 1.5, "seed": 5, "ignore_eos": True}
    first, second = engine.generate_batch(["the", "the"], **options)
    assert first.token_ids == engine.generate("the", **options).token_ids
    assert first.token_ids != second.token_ids


def test_sequence_is_reused_between_turns(engine):
    with engine.sequence() as sequence:
        first = engine.generate([5, 6, 7, 8], 6, ignore_eos=True, sequence=sequence)
        turn = [5, 6, 7, 8, *first.token_ids, 40, 41]
        second = engine.generate(turn, 6, ignore_eos=True, sequence=sequence)
        assert second.timings.prefill_tokens == 3  # the last chosen token and the new two
        assert second.token_ids == engine.generate(turn, 6, ignore_eos=True).token_ids


def test_generation_ends_with_the_context(artifact):
    engine = amx_tvm.runtime.load(artifact, context_length=24)
    result = engine.generate(list(range(1, 21)), max_new_tokens=50, ignore_eos=True)
    assert len(result.token_ids) == 5  # four that fit the cache and the one after them
    assert result.finish_reason == "length"
    full = engine.generate(list(range(1, 25)), max_new_tokens=50, ignore_eos=True)
    assert len(full.token_ids) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.generate([1] * 257), ["257 tokens", "256"]),
        (lambda e: e.generate(""), ["empty"]),
        (lambda e: e.generate([1, 300]), ["300", "position 1", "vocabulary of 300"]),
        (lambda e: e.generate([1, -1]), ["-1"]),
        (lambda e: e.generate([1.5]), ["integers"]),
        (lambda e: e.generate([1], max_new_tokens=0), ["max_new_tokens is 0"]),
        (lambda e: e.generate([1], temperature=-1), ["temperature is -1"]),
        (lambda e: e.generate([1], top_p=0.0), ["top_p is 0.0"]),
        (lambda e: e.generate([1], heat=1), ["heat"]),
        (lambda e: e.logits([1] * 300), ["300 tokens", "256"]),
    ],
)
def test_errors_say_what_was_given(engine, call, words):
    with pytest.raises(GenerationError) as caught:
        call(engine)
    for word in words:
        assert word in str(caught.value)


def test_closed_sequence(engine):
    sequence = engine.sequence()
    sequence.close()
    sequence.close()
    with pytest.raises(GenerationError, match="closed"):
        sequence.append([1])


def test_sequences_run_out(artifact):
    engine = amx_tvm.runtime.load(artifact, max_sequences=2)
    held = [engine.sequence(), engine.sequence()]
    with pytest.raises(GenerationError, match="all 2 sequences"):
        engine.sequence()
    with pytest.raises(GenerationError, match="all 2 sequences"):
        engine.generate([1, 2], 2)
    held.pop()  # one that is dropped is free
    engine.sequence().close()


def test_cache_full_is_an_error_with_numbers(artifact):
    engine = amx_tvm.runtime.load(artifact, kv_tokens=48)
    with engine.sequence() as sequence:
        sequence.append([1] * 32)
        with pytest.raises(GenerationError, match="KV cache is full"):
            sequence.append([1] * 33)
        sequence.append([1] * 10)


@pytest.mark.parametrize("context", [0, toy.CONTEXT + 1])
def test_context_length_out_of_range(artifact, context):
    with pytest.raises(GenerationError, match=f"1 to {toy.CONTEXT}"):
        amx_tvm.runtime.load(artifact, context_length=context)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.generate(None), "the prompt is None, expected a text or token ids"),
        (lambda e: e.generate([[1, 2]]), "expected a flat list"),
        (lambda e: e.generate("a\udcff"), "the prompt holds a byte that is no UTF-8.* behind 1 "),
        (lambda e: e.generate_batch("the"), "prompts are 'the', expected a list"),
        (lambda e: e.generate_batch(None), "prompts are None, expected a list"),
        (lambda e: e.generate([1], logit_bias={300: 1}), "token id 300"),
        (lambda e: e.generate([1], stop_token_ids=[999]), "token id 999"),
        (lambda e: e.scheduler(max_sequences=0), "max_sequences is 0"),
        (lambda e: e.scheduler(prefill_rows="4"), "prefill_rows is '4'"),
    ],
)
def test_wrong_calls(engine, call, words):
    with pytest.raises(GenerationError, match=words):
        call(engine)


@pytest.mark.parametrize(
    ("option", "error"),
    [({"device": 5}, ArtifactError), ({"max_memory": float("nan")}, TargetError)],
    ids=["device", "max_memory"],
)
def test_wrong_places_and_memories_are_named(artifact, option, error):
    with pytest.raises(error, match=str(next(iter(option.values())))):
        amx_tvm.runtime.load(artifact, **option)


@pytest.mark.parametrize(
    "option",
    [
        {"max_sequences": 0},
        {"max_sequences": 2**31},
        {"kv_tokens": 10**30},
        {"kv_tokens": 0},
        {"kv_tokens": "9"},
        {"context_length": 1.5},
    ],
)
def test_wrong_sizes_are_named(artifact, option):
    with pytest.raises(GenerationError, match=f"{next(iter(option))} is .*expected an integer"):
        amx_tvm.runtime.load(artifact, **option)


def test_logprobs_and_least_tokens(engine):
    plain = engine.generate("the cat", 6, ignore_eos=True)
    result = engine.generate("the cat", 6, ignore_eos=True, logprobs=2)
    assert result.token_ids == plain.token_ids and plain.logprobs == []
    assert [entry.token for entry in result.logprobs] == result.token_ids
    assert all(e.top[0] == (e.token, e.logprob) and len(e.top) == 2 for e in result.logprobs)
    first = plain.token_ids[0]
    short = engine.generate("the cat", 6, stop_token_ids=[first])
    assert short.token_ids == [first]
    longer = engine.generate("the cat", 6, stop_token_ids=[first], min_tokens=3)
    assert len(longer.token_ids) >= 3 and first not in longer.token_ids[:3]


def test_long_texts_have_the_same_ids(engine):
    text = "the quick brown fox 🦊 jumps\n" * 1000
    assert engine.encode(text) == engine.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("length", [1, 100_000], ids=["short", "long"])
@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"},
        {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "<unk>"},
    ],
    ids=lambda model: model["type"],
)
def test_text_that_a_vocabulary_lacks(engine, monkeypatch, model, length):
    """The library raises bare Exceptions where there is no token for what is unknown."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model}))
    monkeypatch.setitem(engine.__dict__, "tokenizer", tokenizer)
    with pytest.raises(GenerationError, match="tokenizer cannot encode the prompt: .*; give token"):
        engine.encode("z" * length)
    with pytest.raises(GenerationError, match="tokenizer cannot encode"):
        engine.generate("z" * length, 1)


@pytest.mark.parametrize("path", [None, 5, b"/tmp", "x" * 5000, "a\0b", ["a"]], ids=str)
def test_paths_that_are_none(path):
    with pytest.raises(ArtifactError, match="the artifact is|no such artifact directory"):
        amx_tvm.runtime.load(path)


def test_a_cache_that_the_machine_cannot_hold(artifact):
    """Here it has 4 GB left."""
    code = (
        "import resource, sys, amx_tvm\n"
        "for option in ({'kv_tokens': 2**31 - 1}, {'max_sequences': 2**31 - 1}):\n"
        "    engine = amx_tvm.load(sys.argv[1], threads=1, **option)\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))\n"
        "    try: engine.generate([5, 6], 1)\n"
        "    except amx_tvm.errors.GenerationError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("load with smaller kv_tokens" in line for line in lines), done
