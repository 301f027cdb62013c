"""Chat templates: the same text as transformers, in a sandbox, without transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from amx_tvm.errors import ArtifactError, GenerationError
from amx_tvm.runtime.chat import ChatTemplate, load_chat_template
from amx_tvm.templating.process import TemplateLimitError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 < 3 & 'yes'?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Ünïcode\nand lines"},
]


def test_smollm2(smollm2, tmp_path):
    smollm2.write_tokenizer(tmp_path)
    template = load_chat_template(tmp_path)
    assert template.render([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(CHAT, add_generation_prompt=False).endswith("lines<|im_end|>\n")


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    smollm2.write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = load_chat_template(tmp_path)
    for prompt in (True, False):
        expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert template.render(CHAT, add_generation_prompt=prompt) == expected
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("Hello world")["input_ids"] == [19556, 905]


FEATURES = """\
{%- set ns = namespace(count=0) -%}
{%- for message in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% if message.role == 'assistant' %}
{% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}
    {% else %}
{{ bos_token }}{{ message | tojson }}
    {% endif %}
{%- endfor %}
{{ ns.count }}{{ tools | tojson(indent=2) if tools }}{{ mood }}|{{ missing_token }}
"""


def test_template_language_equals_transformers():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    variables = {"bos_token": "<s>", "eos_token": "</s>", "mood": "good"}
    tools = [{"type": "function", "function": {"name": "f<x>"}}]
    expected = utils._compile_jinja_template(FEATURES).render(
        messages=CHAT, tools=tools, documents=None, add_generation_prompt=True, **variables
    )
    template = ChatTemplate(FEATURES, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(CHAT, tools=tools, mood="good") == expected
    assert "<s>" in expected and "f<x>" in expected and "Yes.</s>" in expected


def test_missing_special_token_is_empty():
    assert ChatTemplate("[{{ bos_token }}]", {"bos_token": None}).render([]) == "[]"


def test_template_may_refuse():
    refuses = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(GenerationError, match="roles must alternate"):
        refuses.render(CHAT)


def test_time_is_available():
    rendered = ChatTemplate("{{ strftime_now('%Y') }}").render([])
    assert rendered.isdigit() and int(rendered) > 2000


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__()[0] }}",
    ],
)
def test_sandbox_holds(attack):
    with pytest.raises(GenerationError):
        ChatTemplate(attack).render(CHAT)


@pytest.mark.parametrize("message", ["Hi", {"content": "Hi"}, {"role": 3, "content": "Hi"}, None])
def test_malformed_messages(message):
    with pytest.raises(GenerationError, match="message 0"):
        ChatTemplate("{{ messages }}").render([message])


def test_template_that_is_no_jinja():
    with pytest.raises(ArtifactError, match="no valid Jinja"):
        ChatTemplate("{% if %}")


def test_artifacts_that_cannot_chat(tmp_path):
    with pytest.raises(ArtifactError, match="tokenizer_config.json"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="JSON"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "x"}))
    with pytest.raises(ArtifactError, match="base model"):
        load_chat_template(tmp_path)


def test_needs_neither_tvm_nor_torch():
    code = (
        "import sys, os; package = type(sys)('amx_tvm.runtime');"
        "package.__path__ = [os.path.dirname(sys.argv[1])];"
        "sys.modules[package.__name__] = package;"
        "import importlib.util as u;"
        "s = u.spec_from_file_location('chat', sys.argv[1]); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); m.ChatTemplate('{{ 1 }}').render([]);"
        "bad = {'tvm', 'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    from amx_tvm.runtime import chat

    subprocess.run([sys.executable, "-c", code, chat.__file__], check=True)


TWIN = "{% set ns = namespace(a=[], b=[]) %}{% for i in range(60) %}" + (
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)
BEYOND = {
    "time in C code": TWIN + "{{ ns.a == ns.b }}",
    "time in a filter": "{{ ('a ' * 10**7)|wordwrap(1)|length }}",
    "memory": "{{ ('A' * 3 * 10**9)|length }}",
    "output": "{% for i in range(99) %}{{ 'x' * 10**6 }}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "depth": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_template_has_limits(name):
    started = time.monotonic()
    with pytest.raises(TemplateLimitError, match="the model's chat template is stopped"):
        ChatTemplate(BEYOND[name]).render(CHAT)
    assert time.monotonic() - started < 60
    assert ChatTemplate("{{ messages[0].content }}").render(CHAT) == "Be brief."


ODD = ("{{ 1 / 0 }}", "{{ messages|slice(0)|list }}", "{{ messages|tojson(cls=namespace) }}")


@pytest.mark.parametrize("source", [*ODD, "{{ (''|attr('format')) }}", "{{ raise_exception() }}"])
def test_errors_of_templates_are_answers(source):
    with pytest.raises(GenerationError, match="refuses this conversation"):
        ChatTemplate(source).render(CHAT)


@pytest.mark.parametrize(
    "source", ["{% break %}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% if 1 %}" * 3000]
)
def test_programs_that_are_none(source):
    with pytest.raises((ArtifactError, TemplateLimitError), match="chat template"):
        ChatTemplate(source)


def test_loops_count_as_ever():
    source = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}"
    assert ChatTemplate(source).render(CHAT[:2]) == "1/2False 2/2True "
    nested = "{% for x in [[1], []] recursive %}{{ x if x is number else loop(x) }}{% endfor %}"
    assert ChatTemplate(nested).render(CHAT) == "1"


def test_a_forked_program_has_a_process_of_its_own():
    template = ChatTemplate("{{ messages[0].role }}")
    assert template.render(CHAT) == "system"
    child = os.fork()
    if child == 0:
        os._exit(0 if template.render(CHAT) == "system" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert template.render(CHAT) == "system"


def test_special_tokens_are_texts(tmp_path):
    config = {"chat_template": "x", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="eos_token is no text"):
        load_chat_template(tmp_path)
