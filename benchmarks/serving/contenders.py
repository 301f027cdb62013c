"""The processes: an engine, our server, llama.cpp's, and who asks them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, TypeVar

LOAD = Path(__file__).with_name("asks.py")
Own = TypeVar("Own", bound="Process")

ENGINE = """
import dataclasses, json, sys, time
import amx_tvm
path, places, threads = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
engine = amx_tvm.load(path, max_sequences=places, threads=threads, kv_tokens=1024 * places)
print("ready", flush=True)

def batch(prompts, options):
    if len(prompts) == 1:
        return [engine.generate(prompts[0], **options)], []
    return engine.generate_batch(prompts, **options), []

def told(prompts, options):
    arrivals = [[] for _ in prompts]
    start = time.perf_counter()
    with engine.scheduler() as scheduler:
        handles = [
            scheduler.add(dataclasses.replace(
                engine.request(prompt, **options),
                on_tokens=lambda _, own=own: own.append(time.perf_counter() - start)))
            for prompt, own in zip(prompts, arrivals)
        ]
        def turn():
            while scheduler.step():
                pass
        engine.call(turn)
    return [handle.result for handle in handles], arrivals

for line in sys.stdin:
    prompts, tokens, times = json.loads(line)
    start = time.perf_counter()
    made, arrivals = (told if times else batch)(
        prompts, {"max_new_tokens": tokens, "ignore_eos": True})
    seconds = time.perf_counter() - start
    assert sum(len(one.token_ids) for one in made) == tokens * len(prompts)
    print(json.dumps({"seconds": seconds, "arrivals": arrivals}), flush=True)
"""


class Process:
    """A process that a `with` block ends."""

    def __init__(self, command: list[str], **options: Any):
        self._process = subprocess.Popen(command, **options)

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


class Lines(Process):
    """A process that answers a line of JSON with one."""

    def __init__(self, command: list[str]):
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        super().__init__(command, **pipes, text=True)

    def line(self) -> str:
        """Return the next line; SystemExit where the process has ended."""
        assert self._process.stdout is not None
        found = self._process.stdout.readline()
        if not found:
            raise SystemExit(f"{self._process.args} has ended")
        return found

    def ask(self, question: Any) -> Any:
        """Send a question and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self.line())


class Engine(Lines):
    """An engine without HTTP."""

    def __init__(self, artifact: Path, places: int, threads: int | None):
        numbers = [str(places), json.dumps(threads)]
        super().__init__([sys.executable, "-c", ENGINE, str(artifact), *numbers])
        self.line()


class Load(Lines):
    """Who asks; see `asks.ask`."""

    def __init__(self) -> None:
        super().__init__([sys.executable, str(LOAD)])


class Served(Process):
    """A server's process, asked at its port; ``start_s`` is the time to /health 200."""

    def __init__(self, command: list[str]):
        self.port = _free_port()
        started = time.perf_counter()
        command = [*command, "--port", str(self.port)]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        super().__init__(command, **quiet)
        while not _healthy(self.port):
            if self._process.poll() is not None or time.perf_counter() - started > 120:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            time.sleep(0.01)
        self.start_s = time.perf_counter() - started

    def get(self, route: str) -> str:
        """Return what a route says."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{route}") as response:
            return response.read().decode()

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """Return the JSON that a route answers; SystemExit where it is an error."""
        status, text = self.answer(route, body)
        if status != 200:
            raise SystemExit(f"{route} answered {status}: {text}")
        return json.loads(text)

    def answer(self, route: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Return the status and the text that a route answers, to a GET without a body."""
        content = None if body is None else json.dumps(body).encode()
        head = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{route}", content, head)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """Return the gauges and counters without labels."""
        lines = [line.rsplit(" ", 1) for line in self.get("/metrics").splitlines()]
        return {name: float(value) for name, value in lines if "{" not in name and "#" not in name}

    def cpu_s(self) -> float:
        """Return processor seconds that its processes have used."""
        ticks = 0
        for pid in self._pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Return the memory that its processes hold; what they share counts once."""
        told = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self._pids()]
        return sum(int(re.findall(r"^Pss:\s+(\d+) kB", one, re.M)[0]) << 10 for one in told)

    def _pids(self) -> list[int]:
        """Return its processes: the one that was started, and those that it has made."""
        pid = self._process.pid
        tasks = Path(f"/proc/{pid}/task").iterdir()
        made = " ".join((task / "children").read_text() for task in tasks)
        return [pid, *map(int, made.split())]


def ours(artifact: Path, places: int, threads: int | None = None, *options: str) -> Served:
    """Start `amx-tvm serve`."""
    command = [sys.executable, "-m", "amx_tvm", "serve", str(artifact)]
    command += ["--max-sequences", str(places)]
    command += ["--threads", str(threads)] if threads is not None else []
    return Served([*command, *options])


def llama(program: Path, gguf: Path, places: int, context: int) -> Served:
    """Start llama.cpp's server with a slot a place; ``context`` is a slot's."""
    command = [str(program), "-m", str(gguf), "-np", str(places), "-c", str(places * context)]
    return Served([*command, "--host", "127.0.0.1", "--no-webui"])


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _healthy(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as one:
            one.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return b" 200 " in one.recv(64)
    except OSError:
        return False
