"""Long prompts: one that arrives beside others, and one that begins like another."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np

from benchmarks.serving.contenders import Load, Served, ours
from benchmarks.serving.prompts import PLAIN, STREAM, WHOLE, Prompts, asked, gaps, middle

LONG = 2048  # tokens of the prompt that arrives
BEGUN_S = 5.0  # when it does: the streams have begun then on a busy machine, too


def arrival(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Eight streams, and a long prompt that arrives."""
    with ours(args.artifact, 9, args.threads, PLAIN) as server, Load() as load:
        found = [_arrived(server, load, prompts) for _ in range(args.repeats + 1)][1:]
    row = {name: [one[name] for one in found] for name in found[0]}
    print(
        f"{LONG} tokens arrive beside 8 streams: between tokens p99 "
        f"{middle(row['p99_over_quiet'])} and p50 {middle(row['p50_over_quiet'])} of the quiet "
        f"median ({1000 * statistics.median(row['quiet_s']):.1f} ms), whose own p99 is "
        f"{middle(row['quiet_p99_over_quiet'])}; its first token "
        f"{middle(row['first_over_alone'])} of alone ({statistics.median(row['alone_s']):.2f} s)",
        flush=True,
    )
    return row


def _arrived(server: Served, load: Load, prompts: Prompts) -> dict[str, float]:
    one = {"max_tokens": 1, **WHOLE, **STREAM}
    alone = asked(load, server, [{**one, "prompt": prompts.ids(LONG)}])
    solo = alone["answers"][0]["arrivals"][0]
    bodies = [{**one, "prompt": prompts.ids(128), "max_tokens": 900} for _ in range(8)]
    bodies.append({**one, "prompt": prompts.ids(LONG)})
    turn = asked(load, server, bodies, delays=[0.0] * 8 + [BEGUN_S])
    *streams, late = turn["answers"]
    begun = max(s["start"] + s["arrivals"][16] for s in streams)
    arrived, first = late["start"], late["start"] + late["arrivals"][0]
    before = [gap for s in streams for gap in gaps(s, begun, arrived)]
    quiet = statistics.median(before)
    busy = [gap for s in streams for gap in gaps(s, arrived, first)]
    return {
        "quiet_s": quiet,
        "quiet_p99_over_quiet": float(np.percentile(before, 99)) / quiet,
        "p99_over_quiet": float(np.percentile(busy, 99)) / quiet,
        "p50_over_quiet": statistics.median(busy) / quiet,
        "first_over_alone": late["arrivals"][0] / solo,
        "alone_s": solo,
    }


def prefix(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Time to first token behind a prefix that is kept, over cold."""
    row: dict[str, Any] = {}
    options = ("--context-length", "8192")  # SmolLM2's; 4096 tokens and what follows exceed 4096
    with ours(args.artifact, 4, args.threads, *options) as server, Load() as load:
        for length in (1024, 4096):
            ratios = []
            for repeat in range(args.repeats + 1):
                common, times = prompts.ids(length), []
                for _ in range(2):
                    body = {"prompt": common + prompts.ids(16), "max_tokens": 4, **WHOLE, **STREAM}
                    times.append(asked(load, server, [body])["answers"][0]["arrivals"][0])
                if repeat:
                    ratios.append(times[1] / times[0])
            row[str(length)] = ratios
            print(
                f"first token behind {length} kept tokens: {middle(ratios)} of cold "
                f"({1000 * times[1]:.1f} of {1000 * times[0]:.0f} ms)",
                flush=True,
            )
    return row
