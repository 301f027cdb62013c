"""A server in a thread of the test's process, or by the command, and what it serves."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import uvicorn

import amx_tvm.runtime
from amx_tvm.server.app import Server, Settings
from amx_tvm.server.limits import Limits

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NAME = "toy"


class Running:
    """A server in a thread of this process: its address, its engine, and how it failed."""

    def __init__(self, engine, settings):
        self.engine = engine
        self.failed: list[BaseException] = []
        engine.sequence().close()
        self.pages = engine._cache.available_pages()
        self.server = Server(engine, settings, self.failed.append)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(self.server.app, port=port, log_level="warning", access_log=False)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run)
        self._thread.start()
        while not self._uvicorn.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, route, **body):
        return self.http.post(route, json=body)

    def free_pages(self):
        """Free pages of the cache, once nothing runs."""
        deadline = time.monotonic() + 60
        while self.server.core.running + self.server.core.waiting:
            assert time.monotonic() < deadline, "answers never ended"
            time.sleep(0.01)
        return self.engine.call(lambda: self.engine._cache.available_pages())

    def close(self):
        self.http.close()
        self.client.close()
        self._uvicorn.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def serving(artifact, keys=(), max_sequences=8, kv_tokens=None, speculation=False, **limits):
    engine = amx_tvm.runtime.load(
        artifact, max_sequences=max_sequences, kv_tokens=kv_tokens, speculation=speculation
    )
    settings = Settings(NAME, ("other",), frozenset(keys), Limits(**limits))
    running = Running(engine, settings)
    try:
        yield running
    finally:
        running.close()


def start(artifact, *options, program=("-m", "amx_tvm", "serve")):
    """Start `amx-tvm serve`; return its process and address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *program, str(artifact), "--port", str(port)]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return process, url
        except httpx.HTTPError:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
    raise AssertionError("the server did not start")
