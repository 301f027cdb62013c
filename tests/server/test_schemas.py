"""Objects of a schema that is a form have the properties that it names."""

from __future__ import annotations

import copy
import json

import pytest

from amx_tvm.server.schemas import closed

A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SHUT = {**A, "additionalProperties": False}


def test_objects_are_closed_at_every_depth():
    assert closed(A) == SHUT
    assert closed({"properties": {"x": A, "y": {"type": "array", "items": A}}}) == {
        "properties": {"x": SHUT, "y": {"type": "array", "items": SHUT}},
        "additionalProperties": False,
    }
    assert closed({"anyOf": [A, {"type": "null"}]}) == {"anyOf": [SHUT, {"type": "null"}]}
    assert closed({"$defs": {"a": A}, "$ref": "#/$defs/a"})["$defs"]["a"] == SHUT


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "additionalProperties": {"type": "string"}},
        {**A, "additionalProperties": True},
        {**A, "patternProperties": {"^b": {}}},
        {**A, "required": ["a", "b"]},  # b is named nowhere
        {**A, "minProperties": 2},
        {"allOf": [A, {"properties": {"b": {}}}]},
        {"oneOf": [A, {"properties": {"b": {}}}]},
        {"anyOf": [A, {"required": ["b"]}], "properties": {"b": {}}},
        {"$defs": {"a": A}, "$ref": "#/$defs/a", "properties": {"b": {}}},
        {**A, "required": 5},
        {"properties": 5},
        {"enum": [{"properties": {}}]},
        True,
        None,
    ],
)
def test_others_stay(schema):
    before = copy.deepcopy(schema)
    assert closed(schema) == before and schema == before


def test_answers_end(served):
    """The toy's random weights would name properties for ever."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": A}}]
    form = {"type": "json_schema", "json_schema": {"schema": A}}
    for seed in range(4):
        body = {"messages": [{"role": "user", "content": "x"}], "temperature": 1.5, "seed": seed}
        bias = {str(served.engine.encode(digit)[0]): -100 for digit in "0123456789"[1:]}
        body |= {"max_tokens": 80, "logit_bias": bias}
        found = served.post("/v1/chat/completions", response_format=form, **body).json()
        assert json.loads(found["choices"][0]["message"]["content"]) == {"a": 0}
        found = served.post("/v1/chat/completions", tools=tools, tool_choice="required", **body)
        call = found.json()["choices"][0]["message"]["tool_calls"][0]["function"]
        assert json.loads(call["arguments"]) == {"a": 0}
