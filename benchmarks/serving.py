"""The server against the engine that it stands on: tokens/s and waiting times over concurrency.

    python benchmarks/serving.py ARTIFACT [--streams 1 8 16] [--json FILE] [--plot FILE]

One process generates with the engine, one serves, one (this) asks by HTTP; they work in turns, so
that what else the machine does meets both alike. A turn is as many chats of PROMPT tokens and
TOKENS new ones as there are streams, all started at once; prompts differ, so nothing is found in a
cache. Tokens/s count from the first request to the last token, prompts included, on both sides. The
client's own time is the processor time of this process over the turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ENGINE = """
import json, sys, time
import amx_tvm
path, places, threads = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
engine = amx_tvm.load(path, max_sequences=places, threads=threads, kv_tokens=1024 * places)
print("ready", flush=True)
for line in sys.stdin:
    prompts, tokens = json.loads(line)
    start = time.perf_counter()
    options = {"max_new_tokens": tokens, "ignore_eos": True}
    if len(prompts) == 1:
        made = [engine.generate(prompts[0], **options)]
    else:
        made = engine.generate_batch(prompts, **options)
    seconds = time.perf_counter() - start
    first = [one.timings.first_token_s for one in made]
    print(json.dumps([sum(len(one.token_ids) for one in made) / seconds, first]), flush=True)
"""


@dataclass
class Stream:
    """Arrival times of one answer, in seconds from the request."""

    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return list(np.diff(self.arrivals))


async def ask(port: int, prompt: list[int], tokens: int) -> Stream:
    """Stream one completion over a connection of its own."""
    body = json.dumps(
        {
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    stream = Stream()
    async for line in reader:
        if not line.startswith(b"data: {"):
            if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                raise SystemExit(f"the server answered {line!r}: {await reader.read()!r}")
            continue
        if b'"choices":[{' in line:
            stream.arrivals.append(time.perf_counter() - start)
        elif b'"usage":{' in line:
            stream.tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    return stream


@dataclass
class Turn:
    """What one turn of the server gave."""

    tokens_per_s: float
    first_s: list[float]
    gaps_s: list[float]
    client_share: float


def turn(port: int, prompts: list[list[int]], tokens: int) -> Turn:
    """Ask for all prompts at once."""

    async def all_of_them() -> list[Stream]:
        return await asyncio.gather(*(ask(port, prompt, tokens) for prompt in prompts))

    start, used = time.perf_counter(), time.process_time()
    streams = asyncio.run(all_of_them())
    seconds = time.perf_counter() - start
    gaps = [gap for stream in streams for gap in stream.gaps]
    first = [stream.arrivals[0] for stream in streams]
    share = (time.process_time() - used) / seconds
    return Turn(sum(stream.tokens for stream in streams) / seconds, first, gaps, share)


class Contenders:
    """The engine's and the server's processes."""

    def __init__(self, artifact: Path, places: int, threads: int | None):
        self.port = _free_port()
        numbers = [str(places), json.dumps(threads)]
        command = [sys.executable, "-c", ENGINE, str(artifact), *numbers]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._engine = subprocess.Popen(command, **pipes, text=True)
        command = [
            sys.executable,
            "-m",
            "amx_tvm",
            "serve",
            str(artifact),
            "--port",
            str(self.port),
        ]
        command += ["--max-sequences", str(places), "--kv-tokens", str(1024 * places)]
        command += ["--threads", str(threads)] if threads is not None else []
        started = time.perf_counter()
        self._server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self._line()
        while not _healthy(self.port):
            if self._server.poll() is not None or time.perf_counter() - started > 120:
                raise SystemExit("the server did not start")
            time.sleep(0.02)
        self.start_s = time.perf_counter() - started

    def engine(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[float]]:
        """Generate with the engine: tokens/s and times to the first tokens."""
        assert self._engine.stdin is not None
        self._engine.stdin.write(json.dumps([prompts, tokens]) + "\n")
        self._engine.stdin.flush()
        speed, first = json.loads(self._line())
        return speed, first

    def close(self) -> None:
        """End both."""
        for process in (self._engine, self._server):
            process.terminate()
            process.wait()

    def _line(self) -> str:
        assert self._engine.stdout is not None
        return self._engine.stdout.readline()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    vocab = json.loads((args.artifact / "manifest.json").read_text())["model"]["vocab_size"]
    random = np.random.default_rng(0)
    contenders = Contenders(args.artifact, max(args.streams), args.threads)
    print(f"start to /health: {contenders.start_s:.2f} s (beside the engine's start)")
    rows: list[dict[str, Any]] = []
    try:
        for streams in args.streams:
            ratios, turns, firsts = [], [], []
            for repeat in range(args.repeats + 1):  # the first one warms up
                prompts = random.integers(100, vocab, (2, streams, args.prompt)).tolist()
                calls = [
                    lambda p=prompts[0]: contenders.engine(p, args.tokens),
                    lambda p=prompts[1]: turn(contenders.port, p, args.tokens),
                ]
                order = (0, 1) if repeat % 2 else (1, 0)
                found: dict[int, Any] = {k: calls[k]() for k in order}
                if repeat:
                    (speed, first), served = found[0], found[1]
                    ratios.append(served.tokens_per_s / speed)
                    turns.append(served)
                    firsts.append(statistics.median(served.first_s) - statistics.median(first))
            rows.append(_row(streams, ratios, turns, firsts))
            print(_line_of(rows[-1]), flush=True)
    finally:
        contenders.close()
    if args.json:
        args.json.write_text(json.dumps({"start_s": contenders.start_s, "rows": rows}, indent=1))
    if args.plot:
        _plot(rows, args.plot)


def _row(streams: int, ratios: list[float], turns: list[Turn], firsts: list[float]) -> dict:
    gaps = sorted(gap for one in turns for gap in one.gaps_s)
    return {
        "streams": streams,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "tokens_per_s": statistics.median(one.tokens_per_s for one in turns),
        "added_first_s": statistics.median(firsts),
        "gap_s": {p: float(np.percentile(gaps, p)) for p in (50, 95, 99)},
        "client_share": statistics.median(one.client_share for one in turns),
        "turns": [asdict(one) for one in turns],
    }


def _line_of(row: dict) -> str:
    gap = "/".join(f"{1000 * row['gap_s'][p]:.2f}" for p in (50, 95, 99))
    low, high = min(row["ratios"]), max(row["ratios"])
    return (
        f"{row['streams']:3d} streams: {row['tokens_per_s']:8.1f} tokens/s, {row['ratio']:.3f} of "
        f"the engine's ({low:.3f}-{high:.3f}), first token {1000 * row['added_first_s']:+.1f} ms, "
        f"between tokens {gap} ms (p50/95/99), client {100 * row['client_share']:.0f} % of a core"
    )


def _plot(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots()
    axes.plot([r["streams"] for r in rows], [r["tokens_per_s"] for r in rows], marker="o")
    axes.set_xlabel("streams")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    plt.savefig(path)


if __name__ == "__main__":
    main()
