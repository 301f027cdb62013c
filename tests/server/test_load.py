"""Many requests at once: none fails, usages are right, draws follow the model's distribution."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serving import serving

COMPLETION = "/v1/completions"
PROMPT = [5, 9, 13, 21, 34, 55]
DRAWS, PLACES = 10_000, 16


@pytest.fixture(scope="module")
def loaded(artifact):
    with serving(artifact, kv_tokens=1024, max_sequences=PLACES) as running:
        yield running


def test_many_requests(loaded):
    """More at once than there are places and pages for; a thousand by `benchmarks.serving`."""
    draw = np.random.default_rng(3)
    lengths = draw.integers((1, 1), (40, 12), (200, 2)).tolist()
    prompts = [draw.integers(10, 200, size).tolist() for size, _ in lengths]

    def ask(index):
        prompt, new = prompts[index], lengths[index][1]
        body = {"prompt": prompt, "max_tokens": new, "ignore_eos": True, "temperature": index % 2}
        return loaded.post(COMPLETION, **body)

    with ThreadPoolExecutor(2 * PLACES) as pool:
        found = list(pool.map(ask, range(len(prompts))))
    assert {one.status_code for one in found} == {200}
    for answer, (size, new) in zip(found, lengths, strict=True):
        usage = answer.json()["usage"]
        told = [usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")]
        assert told == [size, new, size + new]
    assert loaded.free_pages() == loaded.pages


@pytest.mark.slow
def test_draws_follow_the_softmax(loaded, engine):
    """Chi-squared over first tokens, drawn by answers that run sixteen at once."""
    with engine.sequence() as sequence:
        logits = sequence.append(PROMPT).astype(np.float64)
    expected = np.exp(logits - logits.max())
    expected *= DRAWS / expected.sum()

    def ask(seed):
        body = {"prompt": PROMPT, "max_tokens": 1, "n": PLACES, "seed": seed, "ignore_eos": True}
        answer = loaded.post(COMPLETION, **body, logprobs=0)
        return [choice["logprobs"]["tokens"][0] for choice in answer.json()["choices"]]

    with ThreadPoolExecutor(4) as pool:
        drawn = [text for texts in pool.map(ask, range(DRAWS // PLACES)) for text in texts]
    seen = Counter(drawn)
    spelled = [loaded.server._prompts.spelling.text(token) for token in range(expected.size)]
    texts = {text: index for index, text in enumerate(dict.fromkeys(spelled))}
    expected = np.bincount([texts[text] for text in spelled], expected)
    counts = np.array([seen[text] for text in texts])
    assert counts.sum() == DRAWS
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum())
    chi, freedom = ((observed - wanted) ** 2 / wanted).sum(), wanted.size - 1
    print(f"chi-squared {chi:.1f} of {freedom} degrees of freedom")
    assert chi < freedom + 4 * np.sqrt(2 * freedom)  # 4 standard deviations
