"""The server's bars: against the engine that it stands on, against llama.cpp's server, under load.

    python benchmarks/serving.py ARTIFACT [PART ...] [--json FILE] [--plot FILE]

Parts (all of them by default):

speed      chats of PROMPT tokens and TOKENS new ones, streamed, as many as there are streams and
           all at once; the engine generates as many in turns with the server, so that what else
           the machine does meets both alike. Prompts differ, so nothing is found in a cache.
           Tokens/s count from the first request to the last token on both sides, prompts included.
           ``--llama-server PROGRAM --gguf FILE`` puts llama.cpp's server into the turns.
latency    in turns with the engine too: time to first token of one stream, and time between tokens
           of eight, as the scheduler's callbacks see them there.
arrival    eight streams under way, then a prompt of 2048 tokens: times between tokens before and
           meanwhile, and its time to first token beside that alone.
prefix     time to first token behind 1024 and 4096 tokens that an ended answer has left, over cold.
rest       time to /health, processor time when idle, memory over 2000 requests.
load       1000 requests, 32 at once: failures, and usages that are wrong.
leave      200 clients that leave at random moments: pages behind.
queue      time to a 429 where the queue is full.

Who asks is a process of its own (`server_load`); its processor time is told beside.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from server_contenders import CHAT, Engine, Load, Served, llama, ours

COMPLETIONS = "/v1/completions"
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
PLAIN = "--no-speculation"  # a step is a token: the engine's generations do not speculate either
WHOLE = {"temperature": 0, "ignore_eos": True}


class Prompts:
    """Random prompts, as token ids or as chats of so many tokens."""

    def __init__(self, artifact: Path):
        tokenizer = json.loads((artifact / "tokenizer.json").read_text())
        self._random = np.random.default_rng(0)
        vocabulary = tokenizer["model"]["vocab"]
        self._words = [w[1:] for w in vocabulary if re.fullmatch("[Ġ▁][a-z]{3,9}", w)]
        self._size = len(vocabulary)

    def ids(self, count: int) -> list[int]:
        """Return token ids."""
        return self._random.integers(100, self._size - 100, count).tolist()

    def chat(self, server: Served, count: int) -> tuple[list[dict[str, str]], list[int]]:
        """Return messages of about so many tokens, and their ids through the model's template."""

        def made(words: list[str]) -> tuple[list[dict[str, str]], list[int]]:
            asked = f"Write a very long story with these words: {', '.join(words)}."
            messages = [{"role": "user", "content": asked}]
            return messages, server.post("/tokenize", {"messages": messages})["tokens"]

        words = self._random.choice(self._words, count // 2).tolist()
        extra = len(made(words)[1]) - count
        return made(words[: len(words) - extra // 2])


def chat_bodies(chats: list[Any], tokens: int) -> list[dict[str, Any]]:
    """Return requests for streams."""
    return [{"messages": m, "max_tokens": tokens, **WHOLE, **STREAM} for m, _ in chats]


def gaps(answer: dict[str, Any], start: float = 0.0, end: float = float("inf")) -> list[float]:
    """Return seconds between one arrival and the next within a span of the whole turn."""
    times = [answer["start"] + t for t in answer["arrivals"]]
    return [b - a for a, b in zip(times, times[1:], strict=False) if start <= a and b <= end]


def checked(found: dict[str, Any]) -> dict[str, Any]:
    """Return what came, or end where an answer failed."""
    for answer in found["answers"]:
        if answer["status"] != 200 or answer["error"]:
            raise SystemExit(f"an answer failed: {answer['status']} {answer['error']}")
    return found


def speed(args: argparse.Namespace, prompts: Prompts) -> list[dict[str, Any]]:
    """Server over engine, and over llama.cpp's server, at each number of streams."""
    places = max(args.streams)
    engine, load = Engine(args.artifact, places, args.threads), Load()
    server = ours(args.artifact, places, args.threads, "--kv-tokens", str(1024 * places), PLAIN)
    peer = None
    if args.llama_server:
        peer = llama(args.llama_server, args.gguf, places, 1024)
    rows = []
    for streams in args.streams:
        turns: dict[str, list[dict[str, Any]]] = {"engine": [], "server": [], "llama": []}
        for repeat in range(args.repeats + 1):  # the first one warms up
            chats = [[prompts.chat(server, args.prompt) for _ in range(streams)] for _ in range(3)]

            def over_http(one: Served, which: int, chats: list[Any] = chats) -> dict[str, Any]:
                bodies = chat_bodies(chats[which], args.tokens)
                cpu = one.cpu_s()
                found = checked(load.ask({"port": one.port, "path": CHAT, "bodies": bodies}))
                return found | {"server_cpu_s": one.cpu_s() - cpu}

            def batch(chats: list[Any] = chats) -> dict[str, Any]:
                return engine.ask([[ids for _, ids in chats[0]], args.tokens, False])

            calls: list[tuple[str, Callable[[], dict[str, Any]]]] = [
                ("engine", batch),
                ("server", lambda: over_http(server, 1)),
            ]
            if peer is not None:
                calls.append(("llama", lambda: over_http(peer, 2)))
            for name, call in calls if repeat % 2 else reversed(calls):
                found = call()
                if repeat:
                    turns[name].append(found)
        rows.append(_speed_row(streams, args.tokens, turns))
        print(_speed_line(rows[-1]), flush=True)
    for one in (engine, load, server, peer):
        if one is not None:
            one.close()
    return rows


def _speed_row(streams: int, tokens: int, turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    made = streams * tokens
    per_s = {k: [made / one["seconds"] for one in found] for k, found in turns.items()}
    served = turns["server"]
    between = [gap for one in served for answer in one["answers"] for gap in gaps(answer)]
    first = [statistics.median(a["arrivals"][0] for a in one["answers"]) for one in served]
    row = {
        "streams": streams,
        "tokens_per_s": {k: statistics.median(v) for k, v in per_s.items() if v},
        "ratios": [a / b for a, b in zip(per_s["server"], per_s["engine"], strict=True)],
        "first_s": statistics.median(first),
        "between_s": {p: float(np.percentile(between, p)) for p in (50, 95, 99)},
        "load_cpu": statistics.median(one["cpu_s"] / one["seconds"] for one in served),
        "server_cpu": statistics.median(one["server_cpu_s"] / one["seconds"] for one in served),
    }
    if per_s["llama"]:
        pairs = zip(per_s["server"], per_s["llama"], strict=True)
        row["over_llama"] = [a / b for a, b in pairs]
    return row


def _speed_line(row: dict[str, Any]) -> str:
    between = "/".join(f"{1000 * row['between_s'][p]:.2f}" for p in (50, 95, 99))
    line = (
        f"{row['streams']:3d} streams: {row['tokens_per_s']['server']:7.1f} tokens/s, "
        f"{_middle(row['ratios'])} of the engine's, first token {1000 * row['first_s']:.1f} ms, "
        f"between tokens {between} ms (p50/95/99), load {100 * row['load_cpu']:.1f} % of a core, "
        f"server {100 * row['server_cpu']:.0f} %"
    )
    return line + (f", {_middle(row['over_llama'])} of llama.cpp" if "over_llama" in row else "")


def _middle(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def latency(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """What HTTP adds to the times that the engine's callbacks see."""
    engine, load = Engine(args.artifact, 8, args.threads), Load()
    server = ours(args.artifact, 8, args.threads, "--kv-tokens", "8192", PLAIN)

    def served(streams: int, tokens: int) -> list[list[float]]:
        bodies = chat_bodies([prompts.chat(server, args.prompt) for _ in range(streams)], tokens)
        found = checked(load.ask({"port": server.port, "path": CHAT, "bodies": bodies}))
        return [answer["arrivals"] for answer in found["answers"]]

    def alone(streams: int, tokens: int) -> list[list[float]]:
        chats = [prompts.chat(server, args.prompt)[1] for _ in range(streams)]
        return engine.ask([chats, tokens, True])["arrivals"]

    def first(streams: list[list[float]]) -> float:
        return streams[0][0]

    def between(streams: list[list[float]]) -> float:
        made = [np.diff(arrivals[16:]) for arrivals in streams]
        return float(np.median(np.concatenate(made)))

    row = {}
    for name, streams, tokens, read, times in (
        ("first_s", 1, 2, first, 6),
        ("between_s", 8, 64, between, 2),
    ):
        found: dict[str, list[float]] = {"server": [], "engine": []}
        for repeat in range(times * args.repeats + 1):
            for one in (served, alone) if repeat % 2 else (alone, served):
                value = read(one(streams, tokens))
                if repeat:
                    found["server" if one is served else "engine"].append(value)
        added = [a - b for a, b in zip(found["server"], found["engine"], strict=True)]
        row[name] = {**found, "added": added}
        low, middle, high = (1000 * value for value in np.percentile(added, (25, 50, 75)))
        print(
            f"{name} at {streams} streams: {1000 * statistics.median(found['server']):.2f} ms, "
            f"{middle:+.2f} ms to the engine's (quartiles {low:+.2f}, {high:+.2f}; "
            f"{len(added)} pairs)",
            flush=True,
        )
    for each in (engine, load, server):
        each.close()
    return row


def arrival(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Eight streams, and a long prompt that arrives."""
    server, load = ours(args.artifact, 9, args.threads, PLAIN), Load()
    found = []
    for repeat in range(args.repeats + 1):
        alone = {"prompt": prompts.ids(2048), "max_tokens": 1, **WHOLE, **STREAM}
        ask = {"port": server.port, "path": COMPLETIONS}
        solo = checked(load.ask({**ask, "bodies": [alone]}))["answers"][0]["arrivals"][0]
        bodies = [
            {"prompt": prompts.ids(128), "max_tokens": 600, **WHOLE, **STREAM} for _ in range(8)
        ]
        bodies.append({**alone, "prompt": prompts.ids(2048)})
        turn = checked(load.ask({**ask, "bodies": bodies, "delays": [0.0] * 8 + [3.0]}))
        *streams, late = turn["answers"]
        begun = max(s["start"] + s["arrivals"][16] for s in streams)
        arrived, first = late["start"], late["start"] + late["arrivals"][0]
        quiet = [gap for s in streams for gap in gaps(s, begun, arrived)]
        busy = [gap for s in streams for gap in gaps(s, arrived, first)]
        if repeat:
            found.append(
                {
                    "quiet_s": statistics.median(quiet),
                    "p99_over_quiet": float(np.percentile(busy, 99)) / statistics.median(quiet),
                    "p50_over_quiet": statistics.median(busy) / statistics.median(quiet),
                    "first_over_alone": late["arrivals"][0] / solo,
                    "alone_s": solo,
                }
            )
    server.close()
    load.close()
    row = {name: [one[name] for one in found] for name in found[0]}
    print(
        f"2048 tokens arrive beside 8 streams: between tokens p99 {_middle(row['p99_over_quiet'])} "
        f"and p50 {_middle(row['p50_over_quiet'])} of the quiet median "
        f"({1000 * statistics.median(row['quiet_s']):.1f} ms); its first token "
        f"{_middle(row['first_over_alone'])} of alone ({statistics.median(row['alone_s']):.2f} s)",
        flush=True,
    )
    return row


def prefix(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Time to first token behind a prefix that is kept, over cold."""
    server, load = ours(args.artifact, 4, args.threads), Load()
    row: dict[str, Any] = {}
    for length in (1024, 4096):
        ratios = []
        for repeat in range(args.repeats + 1):
            common, times = prompts.ids(length), []
            for _ in range(2):
                body = {"prompt": common + prompts.ids(16), "max_tokens": 4, **WHOLE, **STREAM}
                ask = {"port": server.port, "path": COMPLETIONS, "bodies": [body]}
                times.append(checked(load.ask(ask))["answers"][0]["arrivals"][0])
            if repeat:
                ratios.append(times[1] / times[0])
        row[str(length)] = ratios
        print(
            f"first token behind {length} kept tokens: {_middle(ratios)} of cold "
            f"({1000 * times[1]:.1f} of {1000 * times[0]:.0f} ms)",
            flush=True,
        )
    server.close()
    load.close()
    return row


def rest(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Start, idle time, and memory over many requests."""
    starts = []
    for _ in range(3):
        server = ours(args.artifact, 16, args.threads)
        starts.append(server.start_s)
        server.close()
    server, load = ours(args.artifact, 16, args.threads), Load()

    def some(count: int) -> None:
        bodies = [{"prompt": prompts.ids(24), "max_tokens": 4, **WHOLE} for _ in range(count)]
        ask = {"port": server.port, "path": COMPLETIONS, "bodies": bodies, "at_once": 16}
        checked(load.ask(ask))

    some(200)  # the cache of kept answers is full behind them
    before = server.resident_bytes()
    some(2000)
    grown = server.resident_bytes() / before - 1
    time.sleep(1)
    cpu, began = server.cpu_s(), time.perf_counter()
    time.sleep(args.idle)
    idle = (server.cpu_s() - cpu) / (time.perf_counter() - began)
    server.close()
    load.close()
    print(
        f"start to /health: {_middle(starts)} s; idle: {100 * idle:.2f} % of a core over "
        f"{args.idle} s; memory after 2000 requests: {100 * grown:+.2f} % of {before >> 20} MiB",
        flush=True,
    )
    return {"start_s": starts, "idle": idle, "grown": grown}


def load(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Many requests, 32 at once."""
    server, asks = ours(args.artifact, 16, args.threads), Load()
    lengths = [(8 + 7 * i % 120, 1 + 5 * i % 24) for i in range(1000)]
    bodies = [
        {"prompt": prompts.ids(n), "max_tokens": most, **WHOLE, **(STREAM if i % 2 else {})}
        for i, (n, most) in enumerate(lengths)
    ]
    ask = {"port": server.port, "path": COMPLETIONS, "bodies": bodies, "at_once": 32}
    found = asks.ask(ask)
    failed = wrong = 0
    for answer, (prompt, new) in zip(found["answers"], lengths, strict=True):
        usage = answer["usage"] or {}
        failed += answer["status"] != 200 or answer["error"] is not None
        told = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
        wrong += told != [prompt, new, prompt + new]
    server.close()
    asks.close()
    row = {"requests": len(bodies), "failed": failed, "wrong": wrong, "seconds": found["seconds"]}
    print(
        f"{len(bodies)} requests, 32 at once: {failed} failed, {wrong} usages wrong, "
        f"{found['seconds']:.1f} s",
        flush=True,
    )
    return row


def leave(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Clients that leave."""
    server, asks = ours(args.artifact, 16, args.threads), Load()
    random = np.random.default_rng(1)
    bodies = [
        {"prompt": prompts.ids(64), "max_tokens": 200, **WHOLE, **(STREAM if i % 2 else {})}
        for i in range(200)
    ]
    leaves = random.uniform(0.001, 1.5, 200).tolist()
    ask = {"port": server.port, "path": COMPLETIONS, "bodies": bodies, "at_once": 32}
    found = asks.ask({**ask, "leaves": leaves})
    deadline = time.perf_counter() + 10
    while (m := server.metrics())["amx_tvm_running"] + m["amx_tvm_waiting"]:
        if time.perf_counter() > deadline:
            break
        time.sleep(0.01)
    row = {
        "left": sum(answer["left"] for answer in found["answers"]),
        "pages": m["amx_tvm_pages"],
        "free": m["amx_tvm_pages_free"],
        "kept": m["amx_tvm_pages_kept"],
    }
    server.close()
    asks.close()
    print(
        f"{row['left']} of 200 clients left: {row['free']:.0f} pages free + {row['kept']:.0f} kept "
        f"of {row['pages']:.0f}",
        flush=True,
    )
    return row


def queue(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Time to a refusal."""
    server, asks = ours(args.artifact, 8, args.threads, "--queue", "8"), Load()
    bodies = [{"prompt": prompts.ids(64), "max_tokens": 128, **WHOLE, **STREAM} for _ in range(60)]
    delays = [0.0] * 16 + [1.0 + 0.02 * i for i in range(44)]
    ask = {"port": server.port, "path": COMPLETIONS, "bodies": bodies, "delays": delays}
    refused = [a["seconds"] for a in asks.ask(ask)["answers"] if a["status"] == 429]
    server.close()
    asks.close()
    row = {"refused": len(refused), "p50_s": statistics.median(refused), "most_s": max(refused)}
    print(
        f"{len(refused)} refused while 8 streams run: {1000 * row['p50_s']:.1f} ms (median), "
        f"{1000 * row['most_s']:.1f} ms (longest)",
        flush=True,
    )
    return row


PARTS: dict[str, Callable[[argparse.Namespace, Prompts], Any]] = {
    "speed": speed,
    "latency": latency,
    "arrival": arrival,
    "prefix": prefix,
    "rest": rest,
    "load": load,
    "leave": leave,
    "queue": queue,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--idle", type=int, default=20, help="seconds of idleness")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's llama-server, built here")
    parser.add_argument("--gguf", type=Path, help="the same model for it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if (args.llama_server is None) != (args.gguf is None):
        parser.error("--llama-server and --gguf belong together")
    prompts = Prompts(args.artifact)
    found = {part: PARTS[part](args, prompts) for part in args.parts}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.plot and "speed" in found:
        _plot(found["speed"], args.plot)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots()
    streams = [row["streams"] for row in rows]
    for name in rows[0]["tokens_per_s"]:
        axes.plot(streams, [row["tokens_per_s"][name] for row in rows], marker="o", label=name)
    axes.set_xlabel("streams")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend()
    plt.savefig(path)


if __name__ == "__main__":
    main()
