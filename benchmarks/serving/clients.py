"""Clients of others against a server: run by an environment that has them.

    PYTHON benchmarks/serving/clients.py http://127.0.0.1:8000/v1 MODEL

Each client asks as its own documentation says. A client that is not installed is named and left
out; the exit code is 1 where one failed.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would be fetched
USER = [{"role": "user", "content": "Make up a person with a short name."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "greet", "description": "Greets a person.", "parameters": PERSON},
}


def person_type():  # type: ignore[no-untyped-def]
    from typing import Annotated

    from pydantic import BaseModel, Field

    class Person(BaseModel):
        """A person with a short name."""

        name: Annotated[str, Field(max_length=8)]
        age: Annotated[int, Field(ge=0, le=120)]

    return Person


def same_person(arguments: str) -> None:
    assert set(json.loads(arguments)) == {"name", "age"}, arguments


def openai(url: str, model: str) -> None:
    from openai import NotFoundError, OpenAI

    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    assert client.models.list().data[0].id == model
    plain = {"model": model, "messages": USER, "temperature": 0}
    whole = client.chat.completions.create(**plain, max_completion_tokens=24, logprobs=True)
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)
    stream = client.chat.completions.create(
        **plain, max_completion_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text and not last.choices and last.usage.completion_tokens <= 24
    made = client.completions.create(model=model, prompt=["One,", "Two,"], n=2, max_tokens=8)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    parsed = client.chat.completions.parse(**plain, response_format=person_type())
    assert parsed.choices[0].message.parsed.age >= 0
    named = {"type": "function", "function": {"name": "greet"}}
    for choice in ("none", "auto", "required", named):
        called = client.chat.completions.create(
            **plain, tools=[TOOL], tool_choice=choice, max_tokens=60
        )
        calls = called.choices[0].message.tool_calls
        if choice in ("required", named):
            same_person(calls[0].function.arguments)
        assert choice != "none" or not calls
    with client.chat.completions.stream(**plain, tools=[TOOL], tool_choice="required") as events:
        done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
        same_person(done[0].arguments)
    answer = client.responses.create(model=model, input="Name a colour.", max_output_tokens=16)
    assert answer.output_text and answer.usage.output_tokens <= 16
    parsed = client.responses.parse(model=model, input="A person.", text_format=person_type())
    assert parsed.output_parsed.age >= 0
    asked = {"model": model, "input": "A person.", "text_format": person_type()}
    with client.responses.stream(**asked) as events:
        for _ in events:
            pass
        assert events.get_final_response().output_parsed.age >= 0
    try:
        client.chat.completions.create(model="another", messages=USER)
    except NotFoundError as error:
        assert error.code == "model_not_found", error.code
    else:
        raise AssertionError("another model was served")


def openai_async(url: str, model: str) -> None:
    from openai import AsyncOpenAI

    async def ask(client: AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Count from {number}."}],
            temperature=0,
            max_tokens=16,
            stream=True,
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(16)))

    assert all(asyncio.run(all_of_them()))


def langchain_openai(url: str, model: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=40)
    assert chat.invoke("Name a colour.").usage_metadata["output_tokens"] > 0
    assert "".join(chunk.text for chunk in chat.stream("Name a colour."))
    assert len(asyncio.run(chat.abatch(["One?", "Two?", "Three?"]))) == 3
    kind = person_type()
    assert isinstance(chat.with_structured_output(kind).invoke("Make up a person."), kind)
    calls = chat.bind_tools([kind], tool_choice="required").invoke("A person.").tool_calls
    assert set(calls[0]["args"]) == {"name", "age"}


def litellm(url: str, model: str) -> None:
    import litellm as client

    options = {"model": f"openai/{model}", "api_base": url, "api_key": "none", "max_tokens": 40}
    made = client.completion(messages=USER, **options)
    assert made.usage.completion_tokens > 0 and made.choices[0].message.content
    stream = client.completion(messages=USER, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    made = asyncio.run(client.acompletion(messages=USER, **options))
    assert made.choices[0].message.content
    made = client.completion(messages=USER, tools=[TOOL], tool_choice="required", **options)
    same_person(made.choices[0].message.tool_calls[0].function.arguments)
    assert client.text_completion(prompt="Once", **options).choices[0].text


def instructor(url: str, model: str) -> None:
    import instructor as client
    from openai import OpenAI

    kind = person_type()
    for mode in (client.Mode.TOOLS, client.Mode.JSON_SCHEMA):
        made = client.from_openai(OpenAI(base_url=url, api_key="none"), mode=mode)
        person = made.chat.completions.create(
            model=model, messages=USER, response_model=kind, max_tokens=80, max_retries=0
        )
        assert isinstance(person, kind)


CLIENTS: dict[str, tuple[str, Callable[[str, str], None]]] = {
    "openai": ("openai", openai),
    "openai, async": ("openai", openai_async),
    "langchain-openai": ("langchain_openai", langchain_openai),
    "litellm": ("litellm", litellm),
    "instructor": ("instructor", instructor),
}


def main(url: str, model: str) -> int:
    failed = 0
    for name, (module, check) in CLIENTS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            print(f"{name}: not installed")
            continue
        told = f"{name} {version(module.replace('_', '-'))}"
        try:
            check(url, model)
            print(f"{told}: as expected", flush=True)
        except Exception:
            failed += 1
            print(f"{told}: failed\n{traceback.format_exc()[-1500:]}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
