"""POST /v1/embeddings: OpenAI's schema over a tiny model, base64 too, and what is refused."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

import amx_tvm
from amx_tvm.server.embeddings import EmbeddingServer
from amx_tvm.server.limits import Limits
from amx_tvm.server.service import Settings

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.models import tiny_embedding


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    tiny_embedding.make("bert", folder / "model")
    return amx_tvm.compile(folder / "model", quantization="none", output=folder / "out").path


@pytest.fixture
def client(path):
    server = EmbeddingServer(amx_tvm.load(path), Settings("tiny", (), frozenset(), Limits()))
    with TestClient(server.app) as client:
        yield client


def test_vectors_of_texts_and_of_token_ids(client, path):
    expected = amx_tvm.load(path).embed([[3, 20, 21, 2], [5]])
    body = {"model": "tiny", "input": ["w20 w21", "w5"]}
    found = client.post("/v1/embeddings", json=body).json()
    assert (found["object"], found["model"]) == ("list", "tiny")
    assert found["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [entry["index"] for entry in found["data"]] == [0, 1]
    np.testing.assert_allclose(found["data"][0]["embedding"], expected[0], atol=1e-6)
    for given in ([5], [[5]]):
        one = client.post("/v1/embeddings", json={"input": given}).json()
        np.testing.assert_allclose(one["data"][0]["embedding"], expected[1], atol=1e-6)


def test_base64_prompts_and_dimensions(client, path):
    engine = amx_tvm.load(path)
    body = {"input": "w20", "encoding_format": "base64", "dimensions": 8, "prompt_name": "query"}
    found = client.post("/v1/embeddings", json=body).json()
    vector = np.frombuffer(base64.b64decode(found["data"][0]["embedding"]), "<f4")
    expected = engine.embed("w20", prompt_name="query", dimensions=8)
    np.testing.assert_allclose(vector, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({}, 400, "input", "required"),
        ({"input": []}, 400, "input", "empty"),
        ({"input": "w5", "dimensions": 65}, 400, "dimensions", "the model's are 64"),
        ({"input": "w5", "prompt_name": "x"}, 400, "prompt_name", "'document', 'query'"),
        ({"input": "w5", "encoding_format": "hex"}, 400, "encoding_format", "base64"),
        ({"input": " ".join(["w5"] * 99)}, 400, "input", "101 tokens, the model takes 96"),
        ({"input": [[96]]}, 400, "input", "0 to 95"),
        ({"input": "w5", "model": "other"}, 404, "model", "expected 'tiny'"),
    ],
)
def test_what_is_wrong_is_named(client, body, status, param, words):
    answer = client.post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert words in error["message"]


def test_other_routes(client):
    assert client.get("/health").json() == {"status": "ok"}
    [about] = client.get("/v1/models").json()["data"]
    assert (about["id"], about["max_model_len"]) == ("tiny", 96)
    answer = client.post("/v1/chat/completions", json={"messages": []})
    assert answer.status_code == 404 and "/v1/embeddings" in answer.json()["error"]["message"]
    ids = client.post("/tokenize", json={"prompt": "w5"}).json()
    assert ids["tokens"] == [3, 5, 2]
    assert "amx_tvm_embedded_texts" in client.get("/metrics").text
