"""Images through the server: a chat's answer is the engine's, and errors say what is wrong."""

from __future__ import annotations

import base64
from io import BytesIO

import pytest
import tiny_vision

from amx_tvm.runtime.chat import load_chat_template


@pytest.fixture(scope="module")
def served(made):
    from serving import serving

    with serving(made.artifact, kv_tokens=1024, kept=2) as running:
        yield running


def part(image):
    file = BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def ask(served, *content):
    messages = [{"role": "user", "content": list(content)}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 6}
    return served.post("/v1/chat/completions", **body)


def test_answers_are_the_engines(made, served):
    image = tiny_vision.picture(100, 60)
    content = [part(image), {"type": "text", "text": "w5 w6"}]
    found = ask(served, *content).json()
    prompt = load_chat_template(made.artifact).render([{"role": "user", "content": content}])
    assert prompt == "user <image>w5 w6 w5 "
    expected = made.engine.generate(prompt, 6, images=[image])
    assert found["choices"][0]["message"]["content"] == expected.text
    rows = made.engine.request(prompt, images=[image]).prompt
    assert found["usage"]["prompt_tokens"] == len(rows)
    assert ask(served, *content).json()["choices"] == found["choices"]


def test_what_is_refused(served):
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,bm8="}}
    for content, message in [
        ([broken], "an image is no image that is read"),
        ([{"type": "image_url", "image_url": {"url": "https://a/b.png"}}], "does not read"),
        ([{"type": "text", "text": "<image>"}], "1 places for images (<image>) and 0 images"),
    ]:
        answer = ask(served, *content)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_form_that_the_tokenizer_does_not_allow(served):
    """These models' tokens are words without a decoder, whose bytes nobody knows."""
    body = {"messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 4}
    answer = served.post("/v1/chat/completions", response_format={"type": "json_object"}, **body)
    assert answer.status_code == 400
    assert "its tokenizer does not say which bytes" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "response_format"
    assert served.post("/v1/chat/completions", **body).status_code == 200
