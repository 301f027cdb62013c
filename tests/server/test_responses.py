from __future__ import annotations

import json

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from serving import NAME, serving

ROUTE = "/v1/responses"
EVENTS = TypeAdapter(ResponseStreamEvent)
GREEDY = {"temperature": 0, "max_output_tokens": 12}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "roll", "parameters": SCHEMA, "strict": True}
FORMAT = {"type": "json_schema", "name": "roll", "schema": SCHEMA}


def events_of(served, **body):
    """The events of a stream, each valid to the letter."""
    answer = served.post(ROUTE, stream=True, **body)
    assert answer.status_code == 200, answer.text
    made = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        made.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {made[-1]['type']}"
        EVENTS.validate_python(made[-1], strict=True)
    assert [one["sequence_number"] for one in made] == list(range(len(made)))
    assert [one["type"] for one in made[:2]] == ["response.created", "response.in_progress"]
    return made


BODIES = [
    {"input": "the cat", **GREEDY},
    {"input": "the cat", "instructions": "be brief", "top_logprobs": 2, **GREEDY},
    {"input": "the cat", "text": {"format": FORMAT}, "max_output_tokens": 60},
    {"input": "the cat", "tools": [TOOL], "tool_choice": "required", "max_output_tokens": 80},
    {
        "input": "the cat",
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "roll"},
        "metadata": {"a": "b"},
        "max_output_tokens": 80,
    },
    {"input": "the cat", "tools": [TOOL], "tool_choice": "none", **GREEDY},
]


@pytest.mark.parametrize("body", BODIES)
def test_responses_and_events_are_openais(served, body):
    whole = served.post(ROUTE, **body).json()
    found = Response.model_validate(whole, strict=True)
    assert found.store is not True and whole["usage"]["total_tokens"] == (
        found.usage.input_tokens + found.usage.output_tokens
    )
    last = events_of(served, **body)[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    if body.get("temperature") == 0:
        again = Response.model_validate(last["response"])
        assert again.output_text == found.output_text and again.status == found.status
        deltas = [e for e in events_of(served, **body) if e["type"].endswith("text.delta")]
        assert "".join(e["delta"] for e in deltas) == found.output_text
        entries = [entry for e in deltas for entry in e["logprobs"]]
        assert len(entries) == (found.usage.output_tokens if "top_logprobs" in body else 0)


def test_text_is_the_engines(served, engine):
    expected = engine.generate("[system]be brief\n[user]the cat\n[assistant]", max_new_tokens=12)
    found = served.client.responses.create(
        model=NAME, input="the cat", instructions="be brief", **GREEDY
    )
    assert found.output_text == expected.text
    cut = expected.finish_reason == "length"
    assert found.status == ("incomplete" if cut else "completed")
    assert (found.incomplete_details is not None) == cut
    with served.client.responses.stream(
        model=NAME, input="the cat", instructions="be brief", **GREEDY
    ) as stream:
        texts = [e.delta for e in stream if e.type == "response.output_text.delta"]
    assert "".join(texts) == expected.text


def test_a_conversation_is_sent_as_items(served, engine):
    """Items as the client gives them back: a call, what it returned, and a message."""
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "roll"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "roll", "arguments": '{"n":3}'},
        {"type": "function_call_output", "call_id": "c1", "output": "four"},
    ]
    first = served.client.responses.create(model=NAME, input=items, **GREEDY)
    prompt = "[user]roll\n[assistant]\n[tool]four\n[assistant]"
    assert first.usage.input_tokens == len(engine.encode(prompt))
    more = [*items, *first.output, {"role": "user", "content": "the cat"}]
    second = served.client.responses.create(model=NAME, input=more, **GREEDY)
    prompt += f"{first.output_text}\n[user]the cat\n[assistant]"
    assert second.usage.input_tokens == len(engine.encode(prompt))


def test_calls(served):
    found = served.client.responses.create(
        model=NAME, input="the cat", tools=[TOOL], tool_choice="required", max_output_tokens=80
    )
    (call,) = found.output
    assert (call.type, call.name, call.status) == ("function_call", "roll", "completed")
    assert 0 <= json.loads(call.arguments)["n"] <= 9


def test_parsed_by_the_client(served):
    class Roll(BaseModel):
        n: bool

    found = served.client.responses.parse(
        model=NAME, input="the cat", text_format=Roll, max_output_tokens=60
    )
    assert isinstance(found.output_parsed, Roll)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("background", True),
        ("truncation", "auto"),
        ("input", []),
        ("input", [{"type": "item_reference", "id": "x"}]),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
        ("tools", [{"type": "web_search"}]),
        ("tool_choice", {"type": "function", "name": "none"}),
        ("tool_choice", "required"),
        ("text", {"format": {"type": "json_schema", "name": "x"}}),
        ("include", ["file_search_call.results"]),
        ("max_output_tokens", 0),
        ("max_output_tokens", 10**6),
        ("temperature", 3),
        ("messages", []),
    ],
)
def test_what_is_wrong_is_named(served, field, value):
    answer = served.post(ROUTE, **{"input": "the cat", field: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert field in (error["param"] or "") and field in error["message"]


def test_a_prompt_that_does_not_fit_names_its_field(served):
    answer = served.post(ROUTE, input="the cat " * served.engine.context_length)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input"


def test_thoughts_are_items(served):
    """The thinking part comes as an item of its own, and its tokens are counted."""
    from amx_tvm.server.response_output import Output
    from amx_tvm.server.tools import Delta

    output = Output()
    made = [Delta(reasoning="hm"), Delta(reasoning="m"), Delta("yes"), Delta(call=0, name="f")]
    events = [dict(e) for delta in made for e in output.add(delta, [])] + list(
        output.end("completed")
    )
    for number, one in enumerate(events):
        EVENTS.validate_python({**one, "sequence_number": number}, strict=True)
    kinds = [item["type"] for item in output.items]
    assert kinds == ["reasoning", "message", "function_call"]
    assert output.items[0]["content"] == [{"type": "reasoning_text", "text": "hmm"}]


def test_a_stream_that_fails_says_so(artifact):
    with serving(artifact, timeout_s=0.0) as slow:
        last = events_of(slow, input="the cat")[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["code"] == "server_error"
        with pytest.raises(openai.InternalServerError):
            slow.client.responses.create(model=NAME, input="the cat")
