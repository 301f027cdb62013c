"""The server beside the engine that it stands on, and beside llama.cpp's server."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks.serving.contenders import Engine, Load, Served, llama, ours
from benchmarks.serving.prompts import CHAT, PLAIN, Prompts, asked, chat_bodies, gaps, middle


def speed(args: argparse.Namespace, prompts: Prompts) -> list[dict[str, Any]]:
    """Server over engine, and over llama.cpp's server, at each number of streams."""
    places = max(args.streams)
    size = ("--kv-tokens", str(1024 * places), PLAIN)
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(args.artifact, places, args.threads))
        load = stack.enter_context(Load())
        server = stack.enter_context(ours(args.artifact, places, args.threads, *size))
        peer = None
        if args.llama_server:
            peer = stack.enter_context(llama(args.llama_server, args.gguf, places, 1024))
        return _speeds(args, prompts, engine, load, server, peer)


def _speeds(
    args: argparse.Namespace,
    prompts: Prompts,
    engine: Engine,
    load: Load,
    server: Served,
    peer: Served | None,
) -> list[dict[str, Any]]:
    rows = []
    for streams in args.streams:
        turns: dict[str, list[dict[str, Any]]] = {"engine": [], "server": [], "llama": []}
        for repeat in range(args.repeats + 1):  # the first one warms up
            chats = [[prompts.chat(server, args.prompt) for _ in range(streams)] for _ in range(3)]

            def over_http(one: Served, which: int, chats: list[Any] = chats) -> dict[str, Any]:
                bodies = chat_bodies(chats[which], args.tokens)
                cpu = one.cpu_s()
                found = asked(load, one, bodies, CHAT)
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
        f"{middle(row['ratios'])} of the engine's, first token {1000 * row['first_s']:.1f} ms, "
        f"between tokens {between} ms (p50/95/99), load {100 * row['load_cpu']:.1f} % of a core, "
        f"server {100 * row['server_cpu']:.0f} %"
    )
    return line + (f", {middle(row['over_llama'])} of llama.cpp" if "over_llama" in row else "")


def latency(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """What HTTP adds to the times that the engine's callbacks see."""
    with (
        Engine(args.artifact, 8, args.threads) as engine,
        Load() as load,
        ours(args.artifact, 8, args.threads, "--kv-tokens", "8192", PLAIN) as server,
    ):
        return _latencies(args, prompts, engine, load, server)


def _latencies(
    args: argparse.Namespace, prompts: Prompts, engine: Engine, load: Load, server: Served
) -> dict[str, Any]:
    def served(streams: int, tokens: int) -> list[list[float]]:
        bodies = chat_bodies([prompts.chat(server, args.prompt) for _ in range(streams)], tokens)
        found = asked(load, server, bodies, CHAT)
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
        low, half, high = (1000 * value for value in np.percentile(added, (25, 50, 75)))
        print(
            f"{name} at {streams} streams: {1000 * statistics.median(found['server']):.2f} ms, "
            f"{half:+.2f} ms to the engine's (quartiles {low:+.2f}, {high:+.2f}; "
            f"{len(added)} pairs)",
            flush=True,
        )
    return row
