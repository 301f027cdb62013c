"""Ended answers stay for prompts that begin like them."""

from __future__ import annotations

import numpy as np
import pytest
from serving import serving

from amx_tvm.runtime.prefixes import Prefixes

COMPLETION = "/v1/completions"
PROMPT = [5, 9, 13, 21, 34, 55] * 12  # 72 tokens


class Kept:
    """What `Prefixes` needs of a sequence."""

    def __init__(self, tokens):
        self.tokens, self.closed = list(tokens), False

    def close(self):
        self.closed = True


def test_the_longest_of_one_owner_is_found():
    prefixes = Prefixes(3)
    a, b, c = Kept([1, 2, 3, 4]), Kept([1, 2, 9]), Kept([1, 2, 3, 4, 5, 6])
    prefixes.keep(a, "me")
    prefixes.keep(b, "me")
    assert prefixes.best([1, 2, 3, 9], "me") == (a, 3)
    assert prefixes.best([1, 2, 9, 9, 9], "me") == (b, 3)
    assert prefixes.best([1, 2, 3], "you") == (None, 0)
    assert prefixes.best([7], "me") == (None, 0)
    prefixes.keep(c, "me")  # holds all of a
    assert a.closed and len(prefixes) == 2
    again = Kept([1, 2, 3])
    prefixes.keep(again, "me")  # c has it already
    assert again.closed and len(prefixes) == 2
    prefixes.best([1, 2, 9], "me")
    prefixes.shed()
    assert c.closed and not b.closed  # the least recently used
    prefixes.shed(b)
    assert not b.closed
    prefixes.clear()
    assert b.closed and not prefixes.shed()
    closed = Kept([1])
    Prefixes(0).keep(closed)
    assert closed.closed


@pytest.fixture(scope="module")
def keeping(artifact):
    with serving(artifact, keys=["me", "you"], max_sequences=10, kept=6, kv_tokens=1024) as running:
        yield running


def ask(running, prompt, key="me", tokens=8):
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key}"}
    found = running.http.post(COMPLETION, json=body, headers=headers)
    assert found.status_code == 200, found.text
    found = found.json()
    return found["choices"][0]["text"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_warm_answers_are_the_cold_ones(keeping, engine):
    expected = engine.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
    assert ask(keeping, PROMPT) == (expected.text, 0)
    assert ask(keeping, PROMPT) == (expected.text, len(PROMPT) - 1)
    turn = [*PROMPT, *expected.token_ids[:-1], 60, 61]
    longer = engine.generate(turn, max_new_tokens=8, ignore_eos=True)
    assert ask(keeping, turn) == (longer.text, len(turn) - 2)
    assert ask(keeping, PROMPT, key="you") == (expected.text, 0)  # another's stay another's
    assert ask(keeping, PROMPT, key="you")[1] == len(PROMPT) - 1


def test_kept_sequences_give_way(keeping, engine):
    random = np.random.default_rng(2)
    prompts = random.integers(10, 200, (30, 60)).tolist()
    for prompt in prompts:
        expected = engine.generate(prompt, max_new_tokens=8, ignore_eos=True).text
        assert ask(keeping, prompt)[0] == expected
    long = random.integers(10, 200, 240).tolist()
    assert ask(keeping, long, tokens=10)[1] == 0  # needs pages of those that are kept
    kept = keeping.server.core.state.kept
    assert 1 <= kept <= 6
    keeping.engine.call(keeping.server.core._crank._scheduler.prefixes.clear)
    assert keeping.free_pages() == keeping.pages


def test_scoring_takes_what_is_kept(keeping, engine):
    """All places but those of answers are kept ones: scored prompts, many at once, need none."""
    random = np.random.default_rng(3)
    for prompt in random.integers(10, 200, (12, 40)).tolist():
        ask(keeping, prompt)
    prompts = random.integers(10, 200, (24, 70)).tolist()
    body = {"prompt": prompts, "echo": True, "logprobs": 0, "max_tokens": 0}
    headers = {"authorization": "Bearer me"}
    found = keeping.http.post(COMPLETION, json=body, headers=headers)
    assert found.status_code == 200, found.text
    for prompt, choice in zip(prompts, found.json()["choices"], strict=True):
        rows = engine.logits(prompt).astype(np.float64)[-2]
        truth = rows[prompt[-1]] - rows.max() - np.log(np.exp(rows - rows.max()).sum())
        assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(truth, abs=1e-4)


def test_no_more_is_cached_than_was_asked(artifact):
    with serving(artifact, kept=2) as keeping:
        for known in (0, len(PROMPT) - 1):
            usage = keeping.post(COMPLETION, prompt=PROMPT, max_tokens=2, n=3).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == known
