from __future__ import annotations

import httpx
import pytest
from serving import serving

from amx_tvm.errors import GenerationError
from amx_tvm.server.errors import ApiError
from amx_tvm.server.protocol import CompletionRequest, parse

COMPLETION, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
USER = [{"role": "user", "content": "the cat"}]


def schema(given):
    return {"type": "json_schema", "json_schema": {"schema": given}}


def text_part():
    return {"type": "text", "text": "a"}


def named(function):
    return {"type": "function", "function": {"name": function}}


WRONG_OPTIONS = [
    ("temperature", [-1, "hot", 1e9, [0.5], True]),
    ("top_p", [0, -0.1, 1.5, "x"]),
    ("top_k", [-2, 1.5, "x"]),
    ("min_p", [-0.1, 2, "x"]),
    ("presence_penalty", [-3, 3, "x"]),
    ("frequency_penalty", [-3, 3, "x"]),
    ("repetition_penalty", [0, -1, "x", 5e-324]),
    ("n", [0, 129, 1.5, "x"]),
    ("max_tokens", [-1, 1.5, "x", 100000]),
    ("min_tokens", [-1, "x"]),
    ("seed", [1.5, "x"]),
    ("stop", ["", [""], [1], {}, ["a"] * 17]),
    ("stop_token_ids", [["x"], [-1], [10**6], "x"]),
    (
        "logit_bias",
        [[1], {"5": 101}, {"x": 1}, {"5": "y"}, {"9" * 9: 1}, {"9" * 5000: 1}, {"²": 1}],
    ),
    ("stream", ["yes", 1]),
    ("stream_options", [1, {"include": True}]),
    ("ignore_eos", ["x", 1]),
    ("user", [1]),
    ("model", [1, {}]),
    ("regex", ["(", 1]),
    ("grammar", ["no grammar", 1, "start: start"]),
    ("unheard_of", [1, None]),
]
WRONG_COMPLETIONS = [
    ("prompt", [None, 1, [], [[]], [1, "x"], {"a": 1}, [-1], [10**9], "", [[10**9]]]),
    ("logprobs", [-1, 21, True]),
    ("echo", ["x"]),
    ("best_of", [3]),
    ("suffix", ["x", 1]),
    ("messages", [USER]),
]
WRONG_CHATS = [
    (
        "messages",
        [None, [], "x", [{}], [{"role": "x", "content": "y"}], [{"role": "user", "content": 5}]],
    ),
    ("max_tokens", [0]),
    ("max_completion_tokens", [0, -1]),
    ("modalities", [["audio"]]),
    ("top_logprobs", [21, -1, 2]),
    ("logprobs", [3]),
    (
        "response_format",
        [{"type": "json"}, {}, "x", {"type": "json_schema"}, schema({"$ref": "#"}), schema(False)],
    ),
    ("tools", [[{}], [{"type": "function", "function": {"name": "f", "parameters": "x"}}]]),
    ("chat_template_kwargs", [5, {"self": 1}, {"messages": 5}]),
    ("tool_choice", ["any", {}, *map(named, ["g", [1], {}, None])]),
    ("prompt", ["x"]),
]


def cases():
    for route, base, more in (
        (COMPLETION, {"prompt": "the cat"}, WRONG_COMPLETIONS),
        (CHAT, {"messages": USER}, WRONG_CHATS),
    ):
        for field, values in (*WRONG_OPTIONS, *more):
            for value in values:
                body = {**base, field: value}
                if field == "tool_choice":
                    body["tools"] = [{"type": "function", "function": {"name": "f"}}]
                yield route, body, field


def error_of(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "Traceback" not in error["message"]
    return error


def test_every_wrong_field_is_named(served):
    tried = 0
    for route, body, field in cases():
        error = error_of(served.post(route, **body))
        assert field in error["message"] or field in (error["param"] or ""), (body, error)
        tried += 1
    assert tried >= 150
    assert served.post(COMPLETION, prompt="the cat", max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"5", b'{"prompt": NaN}', b"{}"]
)
def test_bodies_that_are_no_requests(served, content):
    error_of(served.http.post(COMPLETION, content=content))
    error_of(served.http.post(CHAT, content=content))


def test_context_is_never_cut(served):
    limit = served.engine.context_length
    error = error_of(served.post(COMPLETION, prompt=[5] * limit, max_tokens=1))
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert str(limit) in error["message"]
    error = error_of(served.post(CHAT, messages=USER, max_tokens=limit))
    assert str(limit) in error["message"] and error["param"] == "max_tokens"


def test_routes_methods_models(served):
    assert error_of(served.http.get("/v2/nothing"), 404)["type"] == "not_found_error"
    error_of(served.http.get(COMPLETION), 405)
    assert error_of(served.post(CHAT, model="gpt", messages=USER), 404)["code"] == "model_not_found"
    assert served.post(COMPLETION, model="other", prompt="a", max_tokens=1).status_code == 200
    assert [m["id"] for m in served.http.get("/v1/models").json()["data"]] == ["toy", "other"]
    assert served.http.get("/v1/models/toy").json()["id"] == "toy"
    error_of(served.http.get("/v1/models/gpt"), 404)


def test_parts_that_are_no_text_are_named(served):
    def error_with(part):
        content = [{"type": "text", "text": "a"}, part]
        return error_of(served.post(CHAT, messages=[{"role": "user", "content": content}]))

    error = error_with({"type": "input_audio", "input_audio": {"data": ""}})
    assert error["param"] == "messages[0].content[1].type"
    assert "'input_audio'" in error["message"] and "'text'" in error["message"]
    error = error_with({"type": "image_url", "image_url": {"url": "data:"}})
    assert error["param"] == "messages[0].content[1].image_url"
    assert "takes no images" in error["message"]


def test_keys(artifact):
    with serving(artifact, keys=["first", "second", "schlüssel"]) as locked:
        body = {"prompt": "the cat", "max_tokens": 1}
        for headers in ({}, {"authorization": "Bearer third"}, {"authorization": "second"}):
            error_of(locked.http.post(COMPLETION, json=body, headers=headers), 401)
            error_of(locked.http.get("/v1/models", headers=headers), 401)
        right = {"authorization": "Bearer second"}
        assert locked.http.post(COMPLETION, json=body, headers=right).status_code == 200
        other = {"authorization": "Bearer schlüssel".encode()}
        assert locked.http.get("/v1/models", headers=other).status_code == 200
        assert locked.http.get("/health").status_code == 200
        assert "access-control-allow-origin" not in locked.http.get("/health").headers


def test_long_bodies(artifact):
    with serving(artifact, body_bytes=1000) as small:
        error_of(small.http.post(COMPLETION, content=b"x" * 2000), 413)
        assert small.post(COMPLETION, prompt="a", max_tokens=1).status_code == 200


def test_a_full_queue_answers_at_once(artifact):
    with serving(artifact, max_sequences=1, queue=1) as busy:
        body = {"prompt": "the cat", "max_tokens": 200, "ignore_eos": True, "stream": True}
        streams = [busy.http.stream("POST", COMPLETION, json=body) for _ in range(2)]
        for one in streams:
            one.__enter__()
        full = busy.post(COMPLETION, prompt=["a", "b", "c"], max_tokens=1)
        error = error_of(full, 429)
        assert error["code"] == "queue_full" and int(full.headers["retry-after"]) >= 1
        for one in streams:
            one.__exit__(None, None, None)
        assert busy.free_pages() == busy.pages


def test_answers_that_take_too_long(artifact):
    with serving(artifact, timeout_s=0.02) as hasty:
        body = {"prompt": "the cat", "max_tokens": 200, "ignore_eos": True}
        error_of(hasty.post(COMPLETION, **body), 504)
        with hasty.http.stream("POST", COMPLETION, json={**body, "stream": True}) as stream:
            assert '"error"' in list(stream.iter_lines())[-2]
        hasty.free_pages()


def test_page_and_document(served):
    page = served.http.get("/")
    assert page.status_code == 200 and "amx_tvm" in page.text
    assert "http://" not in page.text and "https://" not in page.text  # nothing from elsewhere
    document = served.http.get("/openapi.json").json()
    assert {COMPLETION, CHAT, "/tokenize"} <= set(document["paths"])
    assert document["components"]["schemas"]["ChatRequest"]["required"] == ["messages"]


def test_unknown_errors_are_answered(served, monkeypatch):
    def broken(*_arguments):
        raise RuntimeError("secret")

    monkeypatch.setattr(served.server._prompts, "decode", broken)
    with httpx.Client(base_url=served.url) as client:
        error = error_of(client.post("/detokenize", json={"tokens": [5]}), 500)
    assert "secret" not in error["message"]


def test_what_fails_at_its_start_fails_alone(served, monkeypatch, caplog):
    """A request that cannot start is a 400 where its sender can mend it, a fault a 500."""
    scheduler = served.server.core._crank._scheduler
    problems = [GenerationError("the prompt is too long"), ValueError("secret")]
    add = scheduler.add

    def add_some(request):
        if request.prompt == [5, 6] and problems:
            raise problems.pop(0)
        return add(request)

    monkeypatch.setattr(scheduler, "add", add_some)
    with httpx.Client(base_url=served.url, timeout=60) as client:
        body = {"max_tokens": 20, "ignore_eos": True, "stream": True}
        with client.stream("POST", COMPLETION, json={**body, "prompt": "the cat"}) as other:
            lines = other.iter_lines()
            next(lines)
            error = error_of(client.post(COMPLETION, json={"prompt": [5, 6]}), 400)
            assert "too long" in error["message"] and not caplog.records
            error = error_of(client.post(COMPLETION, json={"prompt": [5, 6]}), 500)
            assert "secret" not in error["message"] and "secret" in caplog.text
            assert list(lines)[-2] == "data: [DONE]"
        assert client.post(COMPLETION, json={"prompt": [5, 6]}).status_code == 200


def test_answers_of_one_request_are_bounded(served):
    for body in ({"prompt": [[5]] * 3000}, {"prompt": [[5]] * 20, "n": 128}):
        error = served.post(COMPLETION, max_tokens=1, **body)
        assert error.status_code == 400 and "at most 2048" in error.json()["error"]["message"]


@pytest.mark.parametrize(
    ("route", "body", "most"),
    [
        (COMPLETION, {"prompt": [5] * (1 << 20) + [5]}, 1 << 20),
        (COMPLETION, {"prompt": ["a"] * 2049}, 2048),
        (COMPLETION, {"prompt": "a", "stop_token_ids": [5] * 1025}, 1024),
        (
            COMPLETION,
            {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(65537)), 1)},
            65536,
        ),
        (CHAT, {"messages": USER * 8193}, 8192),
        (CHAT, {"messages": [{"role": "user", "content": [text_part()] * 1025}]}, 1024),
        (CHAT, {"messages": USER, "tools": [{}] * 1025}, 1024),
        (CHAT, {"messages": USER, "metadata": dict.fromkeys(map(str, range(17)), "a")}, 16),
        (RESPONSES, {"input": USER * 8193}, 8192),
        ("/tokenize", {"prompt": "a" * ((1 << 22) + 1)}, 1 << 22),
        ("/detokenize", {"tokens": [5] * ((1 << 20) + 1)}, 1 << 20),
    ],
)
def test_lists_are_bounded(served, route, body, most):
    error = error_of(served.post(route, **body))
    assert f"at most {most}" in error["message"] and len(error["message"]) < 600


def test_an_error_of_many_is_told_soon(served):
    """Lists end at their first wrong entry: reporting all takes a hundred times as long."""
    body = b'{"prompt": "a", "stop_token_ids": [' + b'"x",' * 1000 + b'"x"]}'
    error = error_of(served.http.post(COMPLETION, content=body))
    assert error["param"] == "stop_token_ids[0]"
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, body)
    assert len(caught.value.__context__.errors()) == 1


def test_a_text_that_cannot_fit_is_not_tokenized(served, monkeypatch):
    text = "the cat " * 100_000
    monkeypatch.setattr(served.engine, "encode", None)
    for route, body in (
        (COMPLETION, {"prompt": text}),
        (COMPLETION, {"prompt": ["x", text]}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
        (CHAT, {"messages": [{"role": "user", "content": ""}] * 8000}),  # the template's own text
    ):
        error = served.post(route, **body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert " characters, at least" in error["message"] and "context is 256" in error["message"]
