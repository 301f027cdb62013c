"""Clients that leave, metrics, the end."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import serving, start
from typer.testing import CliRunner

from amx_tvm.cli.app import app
from amx_tvm.errors import AmxError

COMPLETION = "/v1/completions"
LONG = {"prompt": "the cat", "max_tokens": 200, "ignore_eos": True}


def test_clients_that_leave_free_their_pages(artifact):
    draw = random.Random(5)
    with serving(artifact, kv_tokens=2048) as left:

        def visit(stay, stream):
            try:
                timeout = httpx.Timeout(60, read=stay if not stream else 60)
                with httpx.Client(base_url=left.url, timeout=timeout) as client:
                    if not stream:
                        client.post(COMPLETION, json=LONG)
                        return
                    with client.stream("POST", COMPLETION, json={**LONG, "stream": True}) as lines:
                        end = time.monotonic() + stay
                        for _ in lines.iter_lines():
                            if time.monotonic() > end:
                                return
            except httpx.TimeoutException:
                return

        threads = [
            threading.Thread(target=visit, args=(draw.uniform(0.001, 0.05), i % 2 == 0))
            for i in range(200)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert left.free_pages() == left.pages
        assert left.post(COMPLETION, prompt="the cat", max_tokens=2).status_code == 200


def test_clients_that_leave_at_once_are_no_faults(artifact, caplog):
    """Within the body, behind it, and with a reset: nothing of them is an error of the server."""
    draw = random.Random(7)
    with serving(artifact, kv_tokens=2048) as left:
        host = ("127.0.0.1", int(left.url.rpartition(":")[2]))
        body = json.dumps({**LONG, "stream": True}).encode()
        head = f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        plain = json.dumps({**LONG, "n": 1, "stream": None}).encode().ljust(len(body))
        for index in range(60):
            with socket.create_connection(host) as client:
                whole = head.encode() + (body if index % 2 else plain)
                client.sendall(whole[: -5 if index % 3 == 0 else None])
                time.sleep(draw.choice([0, 0.001, 0.003]))
                if index % 4:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" * 2)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            text = left.http.get("/metrics").text
            families = {f.name: f for f in text_string_to_metric_families(text)}
            posts = {
                s.labels["status"]: s.value
                for s in families["amx_tvm_requests"].samples
                if s.name.endswith("_total") and s.labels["route"] == COMPLETION
            }
            if sum(posts.values()) >= 40:
                break
            time.sleep(0.05)
        assert left.free_pages() == left.pages
        assert not [status for status in posts if status >= "500"], posts
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_metrics_count(artifact):
    with serving(artifact) as counted:
        counted.post(COMPLETION, prompt="the cat", max_tokens=3, ignore_eos=True)
        counted.post(COMPLETION, prompt="the cat", max_tokens=-1)
        families = text_string_to_metric_families(counted.http.get("/metrics").text)
        values = {(s.name, *sorted(s.labels.items())): s.value for f in families for s in f.samples}
        assert values["amx_tvm_generated_tokens_total",] == 3
        assert values["amx_tvm_choices_total", ("reason", "length")] == 1
        route = ("route", COMPLETION)
        assert values["amx_tvm_requests_total", route, ("status", "200")] == 1
        assert values["amx_tvm_requests_total", route, ("status", "400")] == 1
        assert values["amx_tvm_time_to_first_token_seconds_count",] == 1
        assert values["amx_tvm_running",] == 0
        assert values["amx_tvm_page_tokens",] == 16 and values["amx_tvm_token_bytes",] > 0


def test_what_clients_choose_is_no_name_of_a_metric(artifact, caplog):
    with serving(artifact) as counted, caplog.at_level("INFO", "amx_tvm.server"):
        for index in range(9):
            assert counted.http.get(f"/v1/models/x%20{index}").status_code == 404
        told = counted.http.get("/v1/models", headers={"x-request-id": "my-1"})
        assert told.headers["x-request-id"] == "my-1"
        for wrong in ("a b", "x" * 500):
            told = counted.http.get("/v1/models", headers={"x-request-id": wrong})
            assert told.headers["x-request-id"] != wrong
        counted.post(COMPLETION, prompt="a", max_tokens=1, n=50, ignore_eos=True)
        families = text_string_to_metric_families(counted.http.get("/metrics").text)
        routes = {s.labels["route"] for f in families for s in f.samples if "route" in s.labels}
        assert routes == {"/v1/models", "/v1/models/{model:path}", COMPLETION}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 14 and not any("\n" in line for line in lines)
    assert "length*50" in lines[12]


def test_metrics_tell_of_drafts(artifact, engine):
    with serving(artifact, speculation=True) as drafting:
        drafting.engine.speculation.cost.seconds = lambda rows: 1.0 + 1e-6 * rows
        body = {"prompt": [5, 9, 13], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        expected = engine.generate([5, 9, 13], max_new_tokens=40, ignore_eos=True).text
        for _ in range(2):
            answer = drafting.post(COMPLETION, **body).json()
            assert answer["choices"][0]["text"] == expected
            assert answer["usage"]["completion_tokens"] == 40
        families = text_string_to_metric_families(drafting.http.get("/metrics").text)
        values = {s.name: s.value for f in families for s in f.samples}
        assert values["amx_tvm_accepted_tokens_total"] > 20
        assert values["amx_tvm_drafted_tokens_total"] >= values["amx_tvm_accepted_tokens_total"]
        assert 0 < values["amx_tvm_drafted_steps_total"] < 60


def test_bench_measures_a_server(served):
    options = ["--server", served.url, "--streams", "2", "--tokens", "8", "--repeats", "2"]
    done = CliRunner().invoke(app, ["bench", *options, "--prompt", "10", "--json"])
    assert done.exit_code == 0, done.output
    [load] = json.loads(done.stdout)["streams"]
    assert (load["streams"], load["requests"], load["new_tokens"]) == (2, 4, 32)
    assert load["tokens_per_s"] > 0 and load["prompt_tokens"] >= 4 * 10
    assert 0 < load["first_token_s"]["p50"] <= load["first_token_s"]["p99"]
    assert set(load["between_tokens_s"]) == {"p50", "p95", "p99"}
    table = CliRunner().invoke(app, ["bench", *options, "--prompt", "10"])
    assert table.exit_code == 0 and "between tokens" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give an ARTIFACT or --server URL"),
        (["x", "--server", "http://127.0.0.1:1"], "give an ARTIFACT or --server URL"),
        (["--server", "http://127.0.0.1:1"], "is a server listening there"),
        (["--server", "ftp://x"], "expected an address"),
    ],
)
def test_bench_of_no_server(arguments, words):
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code != 0 and isinstance(done.exception, AmxError)
    assert words in str(done.exception)


def test_a_broken_scheduler_shows_in_health(artifact):
    with serving(artifact) as broken:
        assert broken.http.get("/health").status_code == 200

        def step():
            raise RuntimeError("broken")

        broken.server.core._crank._scheduler.step = step
        answer = broken.post(COMPLETION, prompt="the cat", max_tokens=3)
        assert answer.status_code == 503
        assert broken.http.get("/health").status_code == 503
        assert broken.post(COMPLETION, prompt="the cat", max_tokens=3).status_code == 503
        assert [str(error) for error in broken.failed] == ["broken"]


DYING = """
import sys
from amx_tvm.runtime.scheduler import Scheduler
def step(self):
    raise RuntimeError("broken")
Scheduler.step = step
from amx_tvm.cli import main
sys.argv = ["amx-tvm", "serve", *sys.argv[1:]]
main()
"""


def test_a_core_that_dies_ends_the_process(artifact):
    process, url = start(artifact, "--no-speculation", program=["-c", DYING])
    answer = httpx.post(url + COMPLETION, json={"prompt": "the cat", "max_tokens": 3}, timeout=60)
    assert answer.status_code == 503
    try:
        assert httpx.get(f"{url}/health", timeout=60).status_code == 503
    except httpx.HTTPError:
        pass  # it has ended already
    assert process.wait(60) == 1  # of its own accord


def test_sigterm_lets_answers_end(artifact):
    process, url = start(artifact)
    body = {**LONG, "stream": True, "n": 64}
    with httpx.stream("POST", url + COMPLETION, json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(process.pid, signal.SIGTERM)
        while (health := httpx.get(f"{url}/health", timeout=60)).status_code == 200:
            time.sleep(0.01)
        assert health.json() == {"status": "ending"}
        new = httpx.post(url + COMPLETION, json={"prompt": "the cat"}, timeout=60)
        assert new.status_code == 503 and int(new.headers["retry-after"]) >= 1
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    assert process.wait(60) == 0
    log = process.stderr.read()
    assert "POST /v1/completions 200" in log and "the cat" not in log
    assert "Traceback" not in log


def test_bad_artifact_is_one_line(tmp_path):
    command = [sys.executable, "-m", "amx_tvm", "serve", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(tmp_path / "nothing") in done.stderr
