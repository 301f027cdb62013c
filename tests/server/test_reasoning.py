"""The thinking part of an answer, as a message's and as deltas' ``reasoning_content``."""

from __future__ import annotations

import json
import shutil

import pytest
from serving import serving

from amx_tvm.server.reasoning import Reasoning

WHOLE = [
    ("<think>\nso\n</think>\n\nYes.", False, "so\n", "Yes."),
    ("so</think>Yes </think>.", True, "so", "Yes </think>."),
    ("  <think>so", False, "so", ""),
    ("<think></think>Yes", False, "", "Yes"),
    ("<think>a < b </thin</think>\n", False, "a < b </thin", ""),
    (" Yes <think>no</think>", False, "", " Yes <think>no</think>"),
    ("<thin", False, "", "<thin"),
    ("", False, "", ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "inside", "thought", "said"), WHOLE)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_it_is_apart_however_it_comes(text, inside, thought, said, size):
    reader = Reasoning(inside)
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    found = [reader.add(part) for part in parts] + [reader.add("", last=True)]
    assert ("".join(a for a, _ in found), "".join(b for _, b in found)) == (thought, said)


@pytest.fixture(scope="module")
def thinking(artifact, tmp_path_factory):
    """A server whose template opens the thinking part, as that of DeepSeek's models does."""
    path = tmp_path_factory.mktemp("thinking") / "artifact"
    shutil.copytree(artifact, path)
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
        "{% if not plain is defined %}<think>\n{% endif %}"
    )
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with serving(path) as running:
        yield running


def test_a_template_may_open_it(thinking):
    messages = [{"role": "user", "content": "the cat"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    found = thinking.post("/v1/chat/completions", **body).json()["choices"][0]["message"]
    assert found["content"] == "" and found["reasoning_content"]
    body["chat_template_kwargs"] = {"plain": True}
    plain = thinking.post("/v1/chat/completions", **body).json()["choices"][0]["message"]
    assert plain["content"] and "reasoning_content" not in plain
    chunks = thinking.client.chat.completions.create(
        model="toy",
        messages=messages,
        temperature=0,
        max_tokens=12,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    deltas = [c.choices[0].delta for c in chunks]
    thoughts = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert thoughts == found["reasoning_content"] and not any(d.content for d in deltas)


def test_forms_are_not_thoughts(thinking):
    body = {"messages": [{"role": "user", "content": "x"}], "regex": "[a-z]{4}</think>[a-z]{5}"}
    found = thinking.post("/v1/chat/completions", max_tokens=60, **body).json()
    message = found["choices"][0]["message"]
    assert "</think>" in message["content"] and "reasoning_content" not in message


def test_no_embeddings_is_said(thinking):
    found = thinking.post("/v1/embeddings", input="x", model="toy")
    assert found.status_code == 404 and "no embeddings" in found.json()["error"]["message"]
