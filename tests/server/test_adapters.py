"""LoRA adapters are models of a server: requests choose by name, several in one batch."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving import NAME, Running, serving, start

import amx_tvm
from amx_tvm.runtime.sampler import logprobs
from amx_tvm.server.app import Settings
from amx_tvm.server.errors import ServerError

pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import tiny  # noqa: E402
import tiny_adapters  # noqa: E402

COMPLETION = "/v1/completions"
PROMPT = [5, 9, 13, 21, 34, 55] * 4
ASKED = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
NAMES = ["french", "sql"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapted")
    model = tiny.make("llama")
    adapters = {}
    for seed, name in enumerate(NAMES):
        pairs = tiny_adapters.pairs(model, 4, seed)
        adapters[name] = tiny_adapters.write(place / name, pairs, 4)
    made = amx_tvm.compile(
        tiny.save(model, place / "model"),
        quantization="none",
        adapters=adapters,
        output=place / "out",
    )
    return Path(made.path)


@pytest.fixture(scope="module")
def running(adapted):
    with serving(adapted, kv_tokens=2048) as found:
        yield found


def test_answers_are_the_adapters(running, adapted):
    engine = amx_tvm.load(adapted)
    asked = [None, NAME, "other", *NAMES] * 3
    names = {name: (name if name in NAMES else None) for name in asked}

    def ask(name):
        body = ASKED | ({"model": name} if name else {})
        return running.http.post(COMPLETION, json=body)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    texts = {}
    for name, answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        text = answer.json()["choices"][0]["text"]
        expected = engine.generate(PROMPT, 8, adapter=names[name], ignore_eos=True).text
        assert text == expected
        assert answer.json()["model"] == (names[name] or NAME)
        texts[names[name]] = text
    assert len(set(texts.values())) == 3


def test_adapters_are_listed_and_others_are_not_found(running):
    listed = [one["id"] for one in running.http.get("/v1/models").json()["data"]]
    assert listed == [NAME, "other", *NAMES]
    assert running.http.get("/v1/models/sql").json()["id"] == "sql"
    answer = running.post(COMPLETION, model="latin", prompt=PROMPT, max_tokens=1)
    assert answer.status_code == 404
    assert "'french' or 'sql'" in answer.json()["error"]["message"]


def test_prompts_are_scored_by_the_adapter(running, adapted):
    body = ASKED | {"max_tokens": 0, "echo": True, "logprobs": 0}
    found = []
    for name in (NAME, "sql"):
        answer = running.post(COMPLETION, model=name, **body).json()["choices"][0]
        found.append(answer["logprobs"]["token_logprobs"][1:])
    assert found[0] != found[1]
    engine = amx_tvm.load(adapted)
    rows = engine.logits(PROMPT, adapter="sql")
    expected = [
        logprobs(row, token, 0).logprob for row, token in zip(rows, PROMPT[1:], strict=False)
    ]
    assert found[1] == pytest.approx(expected, abs=1e-4)


def test_an_adapter_is_not_called_as_the_model(adapted):
    engine = amx_tvm.load(adapted)
    with pytest.raises(ServerError, match="'sql' names the model and one of its adapters"):
        Running(engine, Settings("sql"))


def test_the_command_serves_adapters(adapted):
    """The front is a process of its own: what a request chose goes through."""
    process, url = start(adapted, "--name", NAME)
    try:
        texts = {}
        for name in (NAME, *NAMES):
            answer = httpx.post(f"{url}{COMPLETION}", json=ASKED | {"model": name}, timeout=60)
            texts[name] = answer.json()["choices"][0]["text"]
    finally:
        process.terminate()
        process.wait(30)
    engine = amx_tvm.load(adapted)
    for name, text in texts.items():
        adapter = name if name in NAMES else None
        assert text == engine.generate(PROMPT, 8, adapter=adapter, ignore_eos=True).text
