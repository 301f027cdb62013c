from __future__ import annotations

import numpy as np
import pytest
from serving import NAME

PROMPT = "the quick brown fox"
GREEDY = {"model": NAME, "temperature": 0, "max_tokens": 12}


def streamed(client, **options):
    options.setdefault("stream_options", {"include_usage": True})
    chunks = list(client.completions.create(stream=True, **options))
    return chunks[:-1], chunks[-1].usage


@pytest.mark.parametrize("chat", [False, True])
def test_usage_with_every_chunk(served, chat):
    api, asked = served.client.completions, {"prompt": PROMPT}
    if chat:
        api = served.client.chat.completions
        asked = {"messages": [{"role": "user", "content": PROMPT}]}
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(api.create(stream=True, stream_options=options, **asked, **GREEDY))
    made = [chunk.usage.completion_tokens for chunk in chunks]
    assert made == sorted(made) and 0 < made[0] and made[-1] == made[-2] == GREEDY["max_tokens"]
    assert len({chunk.usage.prompt_tokens for chunk in chunks}) == 1
    quiet = api.create(
        stream=True, stream_options=options | {"include_usage": False}, **asked, **GREEDY
    )
    assert not any(chunk.usage for chunk in quiet)


def test_whole_and_streamed_answers_are_the_engines(served, engine):
    expected = engine.generate(PROMPT, max_new_tokens=12)
    whole = served.client.completions.create(prompt=PROMPT, **GREEDY)
    assert whole.choices[0].text == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage.prompt_tokens == len(engine.encode(PROMPT))
    assert whole.usage.completion_tokens == len(expected.token_ids)
    chunks, usage = streamed(served.client, prompt=PROMPT, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert [c.choices[0].finish_reason for c in chunks][-1] == expected.finish_reason
    assert usage == whole.usage.model_copy(
        update={"prompt_tokens_details": usage.prompt_tokens_details}
    )


def test_prompts_as_ids_and_in_batches(served, engine):
    ids = engine.encode(PROMPT)
    texts = [engine.generate(p, max_new_tokens=12).text for p in (PROMPT, "the lazy dog")]
    one = served.client.completions.create(prompt=ids, **GREEDY)
    assert one.choices[0].text == texts[0]
    other = engine.encode("the lazy dog")
    for prompts in ([PROMPT, "the lazy dog"], [ids, other]):
        many = served.client.completions.create(prompt=prompts, n=2, **GREEDY)
        assert [c.index for c in many.choices] == [0, 1, 2, 3]
        assert [c.text for c in many.choices] == [texts[0], texts[0], texts[1], texts[1]]
        assert many.usage.prompt_tokens == len(ids) + len(other)


def test_seed_and_n(served):
    options = {"model": NAME, "prompt": PROMPT, "max_tokens": 16, "n": 3, "temperature": 1.5}
    first = served.client.completions.create(seed=7, **options)
    again = served.client.completions.create(seed=7, **options)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert served.client.completions.create(seed=-7, **options).choices[0].text != texts[0]


def test_stops(served, engine):
    text = engine.generate(PROMPT, max_new_tokens=12).text
    stop = text[3:5]
    cut = text[: text.index(stop)]
    found = served.client.completions.create(prompt=PROMPT, stop=[stop, "never"], **GREEDY)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (cut, "stop")
    chunks, _ = streamed(served.client, prompt=PROMPT, stop=stop, **GREEDY)
    assert "".join(c.choices[0].text for c in chunks) == cut
    token = engine.generate(PROMPT, max_new_tokens=12).token_ids[2]
    body = {"prompt": PROMPT, "stop_token_ids": [token], **GREEDY}
    answer = served.post("/v1/completions", **body).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3


def test_echo(served, engine):
    found = served.client.completions.create(prompt=PROMPT, echo=True, **GREEDY)
    assert found.choices[0].text == PROMPT + engine.generate(PROMPT, max_new_tokens=12).text
    chunks, _ = streamed(served.client, prompt=PROMPT, echo=True, **GREEDY)
    assert "".join(c.choices[0].text for c in chunks) == found.choices[0].text


def test_logit_bias_forces_a_token(served, engine):
    token = engine.encode("dog")[0]
    found = served.post("/v1/completions", prompt=PROMPT, logit_bias={str(token): 100}, **GREEDY)
    assert found.json()["choices"][0]["text"] == engine.decode([token] * 12)


def test_logprobs_are_the_models(served, engine):
    expected = engine.generate(PROMPT, max_new_tokens=4)
    ids = engine.encode(PROMPT)
    rows = engine.logits(ids + expected.token_ids)[len(ids) - 1 :]
    options = {**GREEDY, "max_tokens": 4}
    found = served.client.completions.create(prompt=PROMPT, logprobs=3, **options)
    logprobs = found.choices[0].logprobs
    for step, (token, value) in enumerate(
        zip(expected.token_ids, logprobs.token_logprobs, strict=True)
    ):
        row = rows[step].astype(np.float64)
        truth = row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
        assert value == pytest.approx(truth, abs=1e-4)
        assert len(logprobs.top_logprobs[step]) == 3
        assert max(logprobs.top_logprobs[step].values()) == pytest.approx(value, abs=1e-6)
    assert logprobs.text_offset[0] == 0
    chunks, _ = streamed(served.client, prompt=PROMPT, logprobs=3, **options)
    values = [
        v for c in chunks if c.choices[0].logprobs for v in c.choices[0].logprobs.token_logprobs
    ]
    assert values == pytest.approx(logprobs.token_logprobs, abs=1e-6)


def test_no_field_of_a_stream_is_missing(served):
    chunks, usage = streamed(served.client, prompt=PROMPT, **GREEDY)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.object == "text_completion" and chunk.usage is None for chunk in chunks)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    plain = list(served.client.completions.create(stream=True, prompt=PROMPT, **GREEDY))
    assert all(chunk.choices for chunk in plain)


def test_echo_with_logprobs_scores_the_prompt(served, engine):
    ids = engine.encode(PROMPT)
    rows = engine.logits(ids).astype(np.float64)
    truth = rows - rows.max(axis=1, keepdims=True)
    truth -= np.log(np.exp(truth).sum(axis=1, keepdims=True))
    expected = [truth[i, token] for i, token in enumerate(ids[1:])]
    for options in ({"max_tokens": 0}, {"max_tokens": 1}, {"max_tokens": 2, "n": 2}):
        found = served.client.completions.create(
            model=NAME, prompt=[ids, ids], echo=True, logprobs=2, temperature=0, **options
        )
        assert len(found.choices) == 2 * options.get("n", 1)
        for choice in found.choices:
            logprobs = choice.logprobs
            assert logprobs.token_logprobs[0] is None
            assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
            assert "".join(logprobs.tokens[: len(ids)]) == PROMPT
            assert len(logprobs.tokens) == len(ids) + options["max_tokens"]
            starts = [len("".join(logprobs.tokens[:i])) for i in range(len(ids) + 1)]
            assert logprobs.text_offset[: len(ids) + 1] == starts[: len(logprobs.tokens)]
    assert served.free_pages() == served.pages
