"""Answers that are held to a form, and calls of tools."""

from __future__ import annotations

import asyncio
import json
import re

import jsonschema
import pytest
from serving import NAME

from amx_tvm.server import grammar
from amx_tvm.server.grammar import Form, Forms
from amx_tvm.server.tools import Reader

USER = [{"role": "user", "content": "the cat"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": PERSON}},
    {
        "type": "function",
        "function": {
            "name": "count",
            "parameters": {
                "type": "object",
                "properties": {"n": {"enum": [1, 2, 3]}},
                "required": ["n"],
                "additionalProperties": False,
            },
        },
    },
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
HOT = {"model": NAME, "temperature": 1.2, "max_completion_tokens": 150}


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_valid(served, seed):
    response_format = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    found = served.client.chat.completions.create(
        messages=USER, response_format=response_format, seed=seed, n=2, **HOT
    )
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PERSON)
    chunks = served.client.chat.completions.create(
        messages=USER, response_format=response_format, seed=seed, stream=True, **HOT
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == found.choices[0].message.content


class Counted:
    """A mask that counts how often it is asked for."""

    count = 0

    def __init__(self, mask, quick):
        self._mask = mask
        if quick:
            self.take, self.begin = mask.take, mask.begin

    def __call__(self, tokens):
        self.count += 1
        return self._mask(tokens)


def test_greedy_answers_ask_for_few_masks(served):
    form = Form("json_schema", PERSON, "response_format")
    engine, matcher = served.engine, asyncio.run(Forms(served.engine).compile(form))
    masks = [Counted(matcher.mask(), quick) for quick in (False, True)]
    with engine.scheduler() as scheduler:
        made = [
            scheduler.add(engine.request("the cat", mask=mask, max_new_tokens=150)).result
            for mask in masks
        ]
        while scheduler.step():
            pass
    assert made[0].token_ids == made[1].token_ids
    assert made[0].finish_reason == made[1].finish_reason
    assert masks[0].count == len(made[0].token_ids) > masks[1].count


def test_regex_and_grammar(served):
    for extra, pattern in (
        ({"regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"grammar": 'start: "yes" | "no"'}, "yes|no"),
    ):
        body = {"prompt": "the cat", "max_tokens": 40, "temperature": 1.5, "n": 4, **extra}
        for choice in served.post("/v1/completions", **body).json()["choices"]:
            assert re.fullmatch(pattern, choice["text"]) and choice["finish_reason"] == "stop"
    body = {"messages": USER, "regex": "a", "response_format": {"type": "json_object"}}
    assert served.post("/v1/chat/completions", **body).status_code == 400


@pytest.mark.parametrize("more", [{"min_tokens": 9}, {"ignore_eos": True}])
@pytest.mark.parametrize("regex", ["ab", "ab?"])
def test_forms_that_end_before_the_answer_may(served, more, regex):
    body = {"prompt": "the cat", "regex": regex, "max_tokens": 20, "seed": 1, **more}
    answer = served.post("/v1/completions", **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == next(iter(more)) and "form" in error["message"]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "count"}}]
)
def test_forced_calls(served, choice):
    options = {"messages": USER, "tools": TOOLS, "tool_choice": choice, "seed": 3, **HOT}
    found = served.client.chat.completions.create(**options).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.content is None
    (call,) = found.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    if isinstance(choice, dict):
        assert call.function.name == "count"
    chunks = list(served.client.chat.completions.create(stream=True, **options))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name == call.function.name and deltas[0].id
    assert "".join(d.function.arguments for d in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


CALL = '{"name": "count", "arguments": {"n": 2}}'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "plain", "calls"),
    [
        ("just text", "just text", []),
        ("1 < 2 <tool_cal", "1 < 2 <tool_cal", []),
        (f"I count. <tool_call>\n{CALL}\n</tool_call>", "I count. ", [("count", {"n": 2})]),
        (
            f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
            "\n",
            [("count", {"n": 2})] * 2,
        ),
        ("<tool_call>broken</tool_call> on", "<tool_call>broken on", []),
        (f"  {CALL}", "", [("count", {"n": 2})]),
        ('{"name": "f", "parameters": {}}', "", [("f", {})]),
        ('{"other": 1}', '{"other": 1}', []),
        (f"<tool_call>{CALL}", "", [("count", {"n": 2})]),
        ("", "", []),
    ],
)
def test_calls_in_texts(text, plain, calls, size):
    reader, found = Reader(forced=False), []
    for start in range(0, len(text), size):
        found += reader.add(text[start : start + size])
    found += reader.add("", last=True)
    assert "".join(delta.text for delta in found) == plain
    assert [(d.name, json.loads(d.arguments)) for d in found if d.call is not None] == calls
    assert reader.calls == len(calls)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_forced_calls_stream_their_arguments(size):
    text, reader, found = '{"name": "f", "arguments": {"a": {"b": "}"}}}', Reader(forced=True), []
    for start in range(0, len(text), size):
        found += reader.add(text[start : start + size])
    found += reader.add("", last=True)
    assert found[0].name == "f"
    assert "".join(delta.arguments for delta in found) == '{"a": {"b": "}"}}'


def test_a_form_is_compiled_once_and_kept(engine, monkeypatch):
    forms = Forms(engine)
    compiled, compile_one = [], forms._compile
    monkeypatch.setattr(forms, "_compile", lambda form: compiled.append(form) or compile_one(form))

    async def ask(*texts):
        return await asyncio.gather(*(forms.compile(Form("regex", t, "regex")) for t in texts))

    asyncio.run(ask("yes|no"))
    same = asyncio.run(ask("yes|no", "yes|no"))
    assert len(compiled) == 1 and same[0] is same[1]
    first, second = same[0].mask(), same[1].mask()
    allowed = first([])
    first(engine.encode("y")[-1:])  # one answer's mask goes on
    assert (second([]) == allowed).all()  # the other's stands at the beginning
    monkeypatch.setattr(grammar, "_KEPT_TEXT", 60)
    for text in ("a+b", "c+d", "e+f"):
        asyncio.run(ask(text))
    assert len(compiled) == 4
    asyncio.run(ask("e+f"))
    assert len(compiled) == 4
    asyncio.run(ask("yes|no"))  # the longest unasked made room
    assert len(compiled) == 5
