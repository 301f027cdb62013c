from __future__ import annotations

import asyncio

import openai
from serving import NAME

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
PROMPT = "[system]be brief\n[user]the cat\n[assistant]"
GREEDY = {"model": NAME, "temperature": 0, "max_completion_tokens": 12}


def test_answers_are_the_engines(served, engine):
    expected = engine.generate(PROMPT, max_new_tokens=12)
    whole = served.client.chat.completions.create(messages=MESSAGES, **GREEDY)
    message = whole.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.text)
    assert whole.usage.prompt_tokens == len(engine.encode(PROMPT))
    chunks = list(served.client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason


def test_async_client_and_many_at_once(served, engine):
    prompts = [f"the {word} and the cat" for word in ("dog", "fox", "mat", "lazy", "quick")]
    texts = [engine.generate(f"[user]{p}\n[assistant]", max_new_tokens=12).text for p in prompts]

    async def ask(client, prompt):
        stream = await client.chat.completions.create(
            messages=[{"role": "user", "content": prompt}], stream=True, **GREEDY
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, p) for p in prompts))

    assert asyncio.run(all_of_them()) == texts


def test_content_in_parts_and_developer_messages(served, engine):
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}],
        },
    ]
    found = served.client.chat.completions.create(messages=messages, **GREEDY)
    prompt = PROMPT.replace("the cat", "the\ncat")
    assert found.usage.prompt_tokens == len(engine.encode(prompt))


def test_logprobs_of_chat(served):
    options = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **GREEDY}
    found = served.client.chat.completions.create(**options)
    entries = found.choices[0].logprobs.content
    assert len(entries) == found.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)  # greedy
    chunks = list(served.client.chat.completions.create(stream=True, **options))
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in entries]


def test_default_fills_the_context(served):
    body = {"messages": MESSAGES, "ignore_eos": True, "temperature": 0}
    found = served.post("/v1/chat/completions", **body).json()
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] == served.engine.context_length


def test_tokenize_and_detokenize(served, engine):
    found = served.post("/tokenize", messages=MESSAGES).json()
    assert found["tokens"] == engine.encode(PROMPT)
    assert found["count"] == len(found["tokens"])
    assert served.post("/tokenize", prompt="the cat").json()["tokens"] == engine.encode("the cat")
    assert served.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": PROMPT}
