"""The engine and the front in two processes, as the command starts them."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import start

from amx_tvm.server.apart import Remote
from amx_tvm.server.news import News, Piece

COMPLETION = "/v1/completions"
LONG = {"prompt": "the cat", "max_tokens": 200, "ignore_eos": True}


def front_of(process):
    """Return the process that speaks HTTP."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
        [front] = children.read().split()
    return int(front)


def test_an_engine_that_is_killed_ends_its_front(artifact):
    process, url = start(artifact)
    body = {**LONG, "stream": True, "n": 64}
    with httpx.stream("POST", url + COMPLETION, json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.kill()
        try:
            assert "this server has failed" in "".join(lines)
        except httpx.HTTPError:
            pass  # it has ended already
    assert process.wait(60) == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            assert httpx.get(f"{url}/health", timeout=60).status_code == 503
        except httpx.HTTPError:
            break
    else:
        raise AssertionError("the front is still there")


@pytest.mark.parametrize("how", ["killed", "drained", "twice"])
def test_answers_that_are_cut_off_are_told(artifact, how):
    """And the log has no traceback: of a stream, of one that nobody reads, of the application."""
    process, url = start(artifact, "--drain", "0" if how == "drained" else "60")
    body = {**LONG, "stream": True, "n": 64}
    asked = json.dumps(body).encode()
    with httpx.stream("POST", url + COMPLETION, json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as unread:
            head = f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(asked)}\r\n\r\n"
            unread.sendall(head.encode() + asked)
            assert unread.recv(64)
            process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGTERM)
            if how == "twice":
                time.sleep(0.2)
                process.send_signal(signal.SIGINT)
            told = [line for line in lines if line]
            log = process.stderr.read()  # until both processes have ended
    assert process.wait(5) == (-signal.SIGKILL if how == "killed" else 0)
    expected = "has failed" if how == "killed" else "is ending"
    assert json.loads(told[-1].removeprefix("data: "))["error"]["message"].find(expected) > 0
    assert "Traceback" not in log, log


def test_a_front_that_is_killed_ends_its_engine(artifact):
    process, _ = start(artifact)
    os.kill(front_of(process), signal.SIGKILL)
    assert process.wait(5) == 1


def test_signals_that_come_while_others_are_told(artifact):
    """Nobody reads what the engine's process tells, until more waits than the way holds."""
    process, _ = start(artifact)
    front = front_of(process)
    os.kill(front, signal.SIGSTOP)
    try:
        for _ in range(1500):
            process.terminate()
            time.sleep(0.002)
        os.kill(front, signal.SIGCONT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        with suppress(ProcessLookupError):
            os.kill(front, signal.SIGCONT)


def test_both_processes_answer_as_one(artifact, engine):
    """What goes between them: prompts, forms, log-probabilities, errors, who leaves."""
    process, url = start(artifact, "--kv-tokens", "1024", "--keep", "2")
    assert os.sched_getaffinity(front_of(process)) <= os.sched_getaffinity(0)
    try:
        with httpx.Client(base_url=url, timeout=60) as http:
            expected = engine.generate("the cat", max_new_tokens=9, ignore_eos=True).text
            body = {"prompt": "the cat", "max_tokens": 9, "ignore_eos": True, "temperature": 0}
            answer = http.post(COMPLETION, json={**body, "logprobs": 2, "echo": True}).json()
            [choice] = answer["choices"]
            assert choice["text"] == "the cat" + expected
            assert len(choice["logprobs"]["tokens"]) == answer["usage"]["total_tokens"]
            held = http.post(COMPLETION, json={**body, "regex": "(yes|no)", "ignore_eos": False})
            assert held.json()["choices"][0]["text"] in ("yes", "no")
            wrong = http.post(COMPLETION, json={**body, "regex": "a|b"})
            assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "ignore_eos"
            longer = http.post(COMPLETION, json={**body, "stop": [expected[3:6]]}).json()
            assert longer["choices"][0]["text"] == expected[: expected.index(expected[3:6])]
            for seed in range(8):  # the front makes text of tokens, with stop strings the engine
                drawn = {**body, "max_tokens": 40, "temperature": 1.5, "seed": seed, "n": 3}
                texts, same = (
                    [c["text"] for c in http.post(COMPLETION, json=asked).json()["choices"]]
                    for asked in (drawn, {**drawn, "stop": ["that never comes"]})
                )
                assert texts == same and all(texts)
            with pytest.raises(httpx.TimeoutException):
                http.post(COMPLETION, json={**LONG, "n": 64}, timeout=0.1)
            deadline = time.monotonic() + 60
            while True:
                families = text_string_to_metric_families(http.get("/metrics").text)
                told = {s.name: s.value for f in families for s in f.samples}
                pages = [told[f"amx_tvm_pages{which}"] for which in ("", "_free", "_kept")]
                if not told["amx_tvm_running"] + told["amx_tvm_waiting"] and pages[1] > 0:
                    break
                assert time.monotonic() < deadline
            assert told["amx_tvm_kept"] <= 2 and pages[1] + pages[2] >= pages[0] > 0
    finally:
        process.terminate()
    assert process.wait(60) == 0


def test_an_answer_whose_tokens_are_no_text_fails_alone(engine):
    class Broken:
        def decode(self, _tokens):
            raise RuntimeError("secret")

    arrived, sent = [], []
    remote = Remote(arrived.append, sent.append)
    remote.connection_made(SimpleNamespace(write=sent.append))
    fine = engine.request("the cat", max_new_tokens=4)
    remote.add({1: replace(fine, tokenizer=Broken()), 2: fine})
    pieces = {1: Piece(tokens=[5]), 2: Piece(tokens=[5, 6], finish_reason="length")}
    message = pickle.dumps(News(pieces))
    remote.data_received(len(message).to_bytes(4, "little") + message)
    failed, ended = arrived[0].pieces.values()
    assert failed.error.status == 500 and "secret" not in str(failed.error)
    assert ended.error is None and ended.text and len(sent) == 2  # the second cancels the first


BROKEN = """
import sys
from amx_tvm.server.grammar import Forms
matcher = Forms.matcher
def broken(self, form):
    if form.key not in self._kept:  # nobody compiled it here: the engine's process
        raise RuntimeError("secret")
    return matcher(self, form)
Forms.matcher = broken
from amx_tvm.cli import main
sys.argv = ["amx-tvm", "serve", *sys.argv[1:]]
main()
"""


def test_a_request_that_cannot_be_made_again_fails_alone(artifact):
    process, url = start(artifact, program=["-c", BROKEN])
    try:
        with httpx.Client(base_url=url, timeout=60) as http:
            body = {"prompt": "the cat", "max_tokens": 3}
            failed = http.post(COMPLETION, json={**body, "regex": "(yes|no)"})
            assert failed.status_code == 500 and "secret" not in failed.text
            assert http.post(COMPLETION, json=body).status_code == 200
    finally:
        process.terminate()
    assert process.wait(60) == 0
