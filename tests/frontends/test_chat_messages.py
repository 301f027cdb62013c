"""OpenAI's forms of messages in templates of every kind: no Python list or None in a prompt."""

from __future__ import annotations

import json

import pytest

from amx_tvm.errors import ArtifactError, GenerationError
from amx_tvm.runtime.chat import ChatTemplate, ChatTemplates, load_chat_template

LOOP = "{% for m in messages %}"
END = "{% endfor %}"
CALLS = "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
TEMPLATES = {
    "prints text": LOOP + "<{{ m.role }}>{{ m.content }}" + END,
    "adds text": LOOP + "{{ '<' + m['role'] + '>' + m['content'] }}" + END,
    "trims text": LOOP + "<{{ m.role }}>{{ m.content | trim }}" + END,
    "joins text": LOOP + "{{ '<' ~ m.role ~ '>' ~ m.content }}" + END,
    "indents text": LOOP + "<{{ m.role }}>{{ m.content | indent(2) }}" + END,
    "escapes text": LOOP + "<{{ m.role }}>{{ m.content | e }}" + END,
    "prints messages": LOOP + "{{ m }}" + END,
    "messages as text": LOOP + "{{ m | string }}{{ '%s' % m }}{{ m ~ '' }}{{ [m] | join }}" + END,
    "messages as JSON": LOOP + "{{ m | tojson }}" + END,
    "parts": LOOP + "<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}" + END,
    "text or parts": LOOP
    + "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    + "{% for p in m.content %}{{ p['text'] | trim }}{% endfor %}{% endif %}"
    + END,
    "asks for null": LOOP
    + "<{{ m.role }}>{% if m.content is not none %}{{ m.content }}{% endif %}"
    + END,
    "calls as JSON": LOOP
    + "<{{ m.role }}>{{ m.content }}"
    + CALLS
    + '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
    + END
    + END,
    "calls as text": LOOP
    + "<{{ m.role }}>{{ m.content or '' }}"
    + CALLS
    + "{{ f.name + '(' + f.arguments + ')' }}"
    + END
    + END,
    "calls printed": LOOP
    + "<{{ m.role }}>{% if m.content %}{{ m.content }}{% endif %}"
    + CALLS
    + "{{ f.name }}({{ f.arguments }})"
    + END
    + END,
    "calls by name": LOOP
    + "<{{ m.role }}>{{ m.content }}"
    + CALLS
    + "{% for k, v in f.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
    + END
    + END,
    # As Qwen3-Coder's: values that are no objects or lists are spelled out.
    "calls spelled out": LOOP
    + "<{{ m.role }}>{{ m.content }}"
    + CALLS
    + "{% for k, v in f.arguments | items %}{{ k ~ ': ' ~ v }}, {{ v | string }};{% endfor %}"
    + END
    + END,
    # As DeepSeek's: calls are looked for only where the content is null.
    "calls beside null": LOOP
    + "<{{ m.role }}>{% if m.role == 'assistant' and m['content'] is none %}"
    + CALLS
    + "{{ f['name'] + f['arguments'] }}"
    + END
    + "{% else %}{{ m['content'] + '</s>' }}{% endif %}"
    + END,
    "tools as text": "{{ tools | string }}{{ tools ~ '' }}"
    + "{% for t in tools or [] %}{{ t.function.description | trim }}{% endfor %}"
    + LOOP
    + "<{{ m.role }}>{{ m.content }}"
    + END,
    "tools": "{% if tools is not none %}{{ tools }}{% endif %}"
    + LOOP
    + "<{{ m.role }}>{{ m.content }}{{ m.name }}"
    + END,
}
PARTS = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "world"}]


def call(arguments):
    function = {"name": "weather", "arguments": arguments}
    return [{"id": "call_1", "type": "function", "index": None, "function": function}]


CONVERSATIONS = {
    "text": [{"role": "user", "content": "Hello world"}],
    "parts": [{"role": "system", "content": PARTS[:1]}, {"role": "user", "content": PARTS}],
    "texts as parts": [{"role": "user", "content": ["Hello", "world"]}],
    "null beside calls": [
        {"role": "user", "content": "Hello", "name": None},
        {"role": "assistant", "content": None, "tool_calls": call('{"city": "Rome", "day": null}')},
        {"role": "tool", "tool_call_id": "call_1", "content": PARTS},
    ],
    "calls with objects": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "tool_calls": call({"city": "Rome"}), "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"},
    ],
    "null calls": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi", "tool_calls": None, "function_call": None},
        {"role": "user", "content": "Bye", "audio": None},
    ],
    "an answer of nothing": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None},
    ],
}
WEATHER = {"name": "weather", "description": None, "parameters": {"default": None}}
TOOLS = [{"type": "function", "function": WEATHER}]


@pytest.mark.parametrize("tools", [None, [], TOOLS], ids=["none", "empty", "one"])
@pytest.mark.parametrize("form", CONVERSATIONS)
@pytest.mark.parametrize("kind", TEMPLATES)
def test_no_python_in_a_prompt(kind, form, tools):
    given = json.dumps(CONVERSATIONS[form])
    text = ChatTemplate(TEMPLATES[kind]).render(CONVERSATIONS[form], tools=tools)
    assert not any(word in text for word in ("None", "{'", "['", "[{'", "Undefined"))
    words = ("Hello", "world") if "parts" in form else ("Hello",)
    assert all(word in text for word in words)
    assert json.dumps(CONVERSATIONS[form]) == given  # the caller's messages stay as they are


@pytest.mark.parametrize("form", ["text", "null calls", "calls with objects"])
@pytest.mark.parametrize("kind", ["prints text", "asks for null", "calls as JSON", "calls by name"])
def test_what_templates_take_equals_transformers(kind, form):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerBase(chat_template=TEMPLATES[kind])
    messages = CONVERSATIONS[form]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, tools=TOOLS)
    assert ChatTemplate(TEMPLATES[kind]).render(messages, False, TOOLS) == expected


def render(kind, messages, **options):
    return ChatTemplate(TEMPLATES[kind]).render(messages, **options)


def test_parts_become_text_where_a_template_wants_text():
    parts, text = [{"role": "user", "content": PARTS}], [{"role": "user", "content": "Hello world"}]
    assert render("adds text", parts) == "<user>Hello \nworld"
    assert render("text or parts", parts) == "<user>Helloworld"  # the template's own way
    assert render("parts", text) == "<user>Hello world"


def test_arguments_become_what_a_template_wants():
    as_text = CONVERSATIONS["null beside calls"][:2]
    as_object = CONVERSATIONS["calls with objects"][:2]
    assert '"arguments": {"city": "Rome", "day": null}' in render("calls as JSON", as_text)
    assert 'weather({"city": "Rome"})' in render("calls as text", as_object)
    assert 'weather({"city": "Rome"})' in render("calls printed", as_object)
    assert "city=Rome;day=;" in render("calls by name", as_text)
    assert "city: Rome, Rome;day: , null;" in render("calls spelled out", as_text)
    for value, shown in ((True, "True"), ([None, False], "[null, false]"), ({"a": 1}, '{"a": 1}')):
        calls = [as_object[0], {"role": "assistant", "tool_calls": call({"x": value})}]
        assert f"x: {shown}, {shown};" in render("calls spelled out", calls)
        assert f"x={shown};" in render("calls by name", calls)
    assert 'weather{"city": "Rome"}' in render("calls beside null", as_object)
    broken = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": call("{oh")}]
    assert '"{oh"' in render("calls as JSON", broken)


def test_names_of_tools():
    messages = CONVERSATIONS["calls with objects"]
    assert render("tools", messages).endswith("<tool>21 degreesweather")
    named = [*messages[:2], {**messages[2], "name": "other"}]
    assert render("tools", named).endswith("<tool>21 degreesother")


def test_reasoning_under_its_names():
    template = ChatTemplate(LOOP + "{{ m.reasoning_content }}|{{ m.thinking }};" + END)
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert template.render([{"role": "assistant", "content": "a", name: "why"}]) == "why|why;"


@pytest.mark.parametrize(
    "message, word",
    [
        ({"role": "user"}, "no 'content'"),
        ({"role": "system", "content": None}, "no 'content'"),
        ({"role": "user", "content": 5}, "content 5"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "'text'"),
        ({"role": "user", "content": [None]}, "'NoneType'"),
        ({"role": "assistant", "tool_calls": "f()"}, "tool_calls"),
        ({"role": "assistant", "tool_calls": ["f()"]}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [{"function": "f()"}]}, "calls 'f"),
        ({"role": "assistant", "tool_calls": [{"function": None}]}, "calls {}"),
    ],
)
def test_messages_that_are_refused(message, word):
    with pytest.raises(GenerationError, match=word) as caught:
        render("text or parts", [{"role": "user", "content": "Hi"}, message])
    assert "message 1" in str(caught.value)


@pytest.mark.parametrize("tools", ["weather", 5, [print], {"type": "function"}])
def test_tools_that_are_refused(tools):
    with pytest.raises(GenerationError, match="tools are"):
        render("tools", CONVERSATIONS["text"], tools=tools)


@pytest.mark.parametrize("messages", [None, "Hi", {"role": "user", "content": "Hi"}, 5])
def test_chats_that_are_no_lists(messages):
    with pytest.raises(GenerationError, match="the chat is .*, expected a list of messages"):
        render("prints text", messages)


@pytest.mark.parametrize(
    "program",
    ["{{ 1 / 0 }}", "{{ [][0].x }}", "{{ '{}'.format() }}", "{{ 5 | indent }}", "{{ 'a' + 1 }}"],
)
def test_templates_that_fail_in_any_way_refuse(program):
    with pytest.raises(GenerationError, match="template refuses this conversation: .+"):
        ChatTemplate(program).render(CONVERSATIONS["text"])


# ---- several templates


def test_the_template_of_a_request():
    templates = ChatTemplates({"default": "D", "tool_use": "T", "rag": "R"})
    messages = CONVERSATIONS["text"]
    assert templates.render(messages) == "D" == templates.render(messages, tools=[])
    assert templates.render(messages, tools=TOOLS) == "T"
    assert templates.render(messages, tools=TOOLS, template="rag") == "R"
    assert ChatTemplates({"default": "D"}).render(messages, tools=TOOLS) == "D"
    assert ChatTemplates({"rag": "R"}).render(messages) == "R"
    with pytest.raises(GenerationError, match="'default'; it has 'a', 'b'"):
        ChatTemplates({"a": "A", "b": "B"}).render(messages)
    with pytest.raises(GenerationError, match="'c'"):
        templates.render(messages, template="c")


@pytest.mark.parametrize(
    "stored, expected",
    [
        ("D", "DD"),
        ([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}], "DT"),
        ([{"name": "tool_use", "template": "T"}], "TT"),
        ({"default": "D", "tool_use": "T"}, "DT"),
    ],
)
def test_templates_of_an_artifact(tmp_path, stored, expected):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    templates, messages = load_chat_template(tmp_path), CONVERSATIONS["text"]
    assert templates.render(messages) + templates.render(messages, tools=TOOLS) == expected


@pytest.mark.parametrize("stored", [[{"name": "default"}], {"default": 5}, [{"template": "T"}]])
def test_templates_that_are_no_text(tmp_path, stored):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    with pytest.raises(ArtifactError, match="no text"):
        load_chat_template(tmp_path)
