"""A server over its life: start, idleness, many requests, clients that leave, a full queue."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.serving.contenders import Load, Served, ours
from benchmarks.serving.prompts import COMPLETIONS, STREAM, WHOLE, Prompts, asked, middle


def rest(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Start, idle time, and memory over many requests."""
    starts = []
    for _ in range(3):
        with ours(args.artifact, 16, args.threads) as server:
            starts.append(server.start_s)
    size = ("--kv-tokens", "4096")  # all pages are in use soon: a page's memory comes at its first
    with ours(args.artifact, 16, args.threads, *size) as server, Load() as load:

        def some(count: int) -> None:
            bodies = [{"prompt": prompts.ids(24), "max_tokens": 4, **WHOLE} for _ in range(count)]
            asked(load, server, bodies, at_once=16)

        some(200)  # the cache is full of kept answers behind them
        before = server.resident_bytes()
        some(2000)
        grown = server.resident_bytes() / before - 1
        time.sleep(1)
        idle = _idle(server, args.idle)
    print(
        f"start to /health: {middle(starts)} s; idle: {100 * idle:.2f} % of a core over "
        f"{args.idle} s; memory after 2000 requests: {100 * grown:+.2f} % of {before >> 20} MiB",
        flush=True,
    )
    return {"start_s": starts, "idle": idle, "grown": grown}


def _idle(server: Served, seconds: int) -> float:
    cpu, began = server.cpu_s(), time.perf_counter()
    time.sleep(seconds)
    return (server.cpu_s() - cpu) / (time.perf_counter() - began)


def load(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Many requests, 32 at once."""
    lengths = [(8 + 7 * i % 120, 1 + 5 * i % 24) for i in range(1000)]
    bodies = [
        {"prompt": prompts.ids(n), "max_tokens": most, **WHOLE, **(STREAM if i % 2 else {})}
        for i, (n, most) in enumerate(lengths)
    ]
    with ours(args.artifact, 16, args.threads) as server, Load() as asks:
        ask = {"port": server.port, "path": COMPLETIONS, "bodies": bodies, "at_once": 32}
        found = asks.ask(ask)
    failed = wrong = 0
    for answer, (prompt, new) in zip(found["answers"], lengths, strict=True):
        usage = answer["usage"] or {}
        failed += answer["status"] != 200 or answer["error"] is not None
        told = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
        wrong += told != [prompt, new, prompt + new]
    row = {"requests": len(bodies), "failed": failed, "wrong": wrong, "seconds": found["seconds"]}
    print(
        f"{len(bodies)} requests, 32 at once: {failed} failed, {wrong} usages wrong, "
        f"{found['seconds']:.1f} s",
        flush=True,
    )
    return row


def leave(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Clients that leave."""
    random = np.random.default_rng(1)
    bodies = [
        {"prompt": prompts.ids(64), "max_tokens": 200, **WHOLE, **(STREAM if i % 2 else {})}
        for i in range(200)
    ]
    leaves = random.uniform(0.001, 1.5, 200).tolist()
    with ours(args.artifact, 16, args.threads) as server, Load() as asks:
        ask = {"port": server.port, "path": COMPLETIONS, "bodies": bodies, "at_once": 32}
        found = asks.ask({**ask, "leaves": leaves})
        m = _drained(server)
    row = {
        "left": sum(answer["left"] for answer in found["answers"]),
        "pages": m["amx_tvm_pages"],
        "free": m["amx_tvm_pages_free"],
        "kept": m["amx_tvm_pages_kept"],
    }
    print(
        f"{row['left']} of 200 clients left: {row['free']:.0f} pages free + {row['kept']:.0f} kept "
        f"of {row['pages']:.0f}",
        flush=True,
    )
    return row


def _drained(server: Served) -> dict[str, float]:
    """Return the metrics behind the last answer; pages that are missing then are so for ever.

    The engine ends answers behind the step under way, and tells of their pages then.
    """
    deadline = time.perf_counter() + 20
    while True:
        m = server.metrics()
        missing = m["amx_tvm_pages"] - m["amx_tvm_pages_free"] - m["amx_tvm_pages_kept"]
        if not m["amx_tvm_running"] + m["amx_tvm_waiting"] and missing <= 0:
            return m
        if time.perf_counter() > deadline:
            return m
        time.sleep(0.05)


def queue(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Time to a refusal."""
    bodies = [{"prompt": prompts.ids(64), "max_tokens": 128, **WHOLE, **STREAM} for _ in range(216)]
    delays = [0.0] * 16 + [1.0 + 0.005 * i for i in range(200)]
    with ours(args.artifact, 8, args.threads, "--queue", "8") as server, Load() as asks:
        ask = {"port": server.port, "path": COMPLETIONS, "bodies": bodies, "delays": delays}
        refused = [a["seconds"] for a in asks.ask(ask)["answers"] if a["status"] == 429]
    row = {"refused": len(refused), "p50_s": statistics.median(refused), "most_s": max(refused)}
    p99 = float(np.percentile(refused, 99))
    print(
        f"{len(refused)} refused while 8 streams run: {1000 * row['p50_s']:.1f} ms (median), "
        f"{1000 * p99:.1f} ms (p99), {1000 * row['most_s']:.1f} ms (longest)",
        flush=True,
    )
    return row | {"p99_s": p99}
