"""Rows of cpu_models as text, as the table of bars, and as a plot.

A row is one contender in one case: {model, threads, case, contender, tokens, seconds: one number a
repeat, ...}. All seconds of one repeat were taken in one go, so ratios are taken repeat by
repeat.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

OURS, W4A4 = "amxfp4", "amxfp4-w4a4"
Rows = list[dict[str, Any]]


def rate(row: dict[str, Any]) -> float:
    """Return tokens/s, median over the repeats."""
    return float(row["tokens"] / np.median(row["seconds"]))


def quartiles(slow: dict[str, Any], fast: dict[str, Any]) -> tuple[float, float, float]:
    """Return how many times as many tokens/s ``fast`` makes: lower quartile, median, upper."""
    per_token = np.array(slow["seconds"]) / slow["tokens"]
    ratio = per_token / (np.array(fast["seconds"]) / fast["tokens"])
    low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def share(row: dict[str, Any]) -> float:
    """Return the part of the read bandwidth that a decode case of ours used."""
    ask, facts = row["ask"], row["facts"]
    moved = facts["weight_bytes"] / ask["batch"]
    moved += facts["kv_bytes"] * (ask["context"] + ask["steps"] // 2)
    return rate(row) * moved / row["read_bandwidth"]


def show(rows: Rows) -> None:
    """Print the contenders of one case."""
    ours = next(row for row in rows if row["contender"] == OURS)
    for row in rows:
        low, middle, high = quartiles(row, ours)
        print(
            f"{row['model']:9} {row['threads']} threads {row['case']:15} {row['contender']:16} "
            f"{rate(row):8.1f} tokens/s   {OURS}: {middle:.2f} ({low:.2f}-{high:.2f}) times",
            flush=True,
        )


def table(rows: Rows) -> str:
    """Return a Markdown table: every comparison that has a bar, beside it."""
    lines = [
        "| model | threads | work | tokens/s | against | tokens/s | ratio (quartiles) | bar |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, threads in dict.fromkeys((r["model"], r["threads"]) for r in rows):
        found = {
            (row["case"], row["contender"]): row
            for row in rows
            if (row["model"], row["threads"]) == (model, threads)
        }
        for row, other, bar in _comparisons(found, model, threads):
            low, middle, high = quartiles(other, row)
            lines.append(
                f"| {model} | {threads} | {_label(row)} | {rate(row):.1f} | {_label(other)} | "
                f"{rate(other):.1f} | {middle:.2f} ({low:.2f}-{high:.2f}) | {bar} |"
            )
        decode = found.get(("decode 128", OURS))
        if decode and model != "smollm2":
            reads = decode["read_bandwidth"] / 1e9
            lines.append(
                f"| {model} | {threads} | {_label(decode)} | {rate(decode):.1f} | reads of "
                f"{reads:.1f} GB/s | | {share(decode):.2f} of them | 0.75 |"
            )
    return "\n".join(lines)


def _label(row: dict[str, Any]) -> str:
    return f"{row['contender']}, {row['case']}"


def _comparisons(
    found: dict[tuple[str, str], dict[str, Any]], model: str, threads: int
) -> Iterable[tuple[dict[str, Any], dict[str, Any], str]]:
    """Yield (ours, what it is held against, bar) of one model and thread count."""
    decode_bar = "1.15" if model != "smollm2" and threads > 1 else "1.3"
    for case in dict.fromkeys(case for case, _ in found):
        ours = found[case, OURS]
        peers = [r for (c, name), r in found.items() if c == case and name.startswith("llama.cpp")]
        if peers:
            best = max(peers, key=rate)
            yield ours, best, {"decode 128": decode_bar, "prefill 512": "2"}.get(case, "none")
        if (case, W4A4) in found:
            bar = "none" if case == "decode 8 x 128" else "0.8"
            yield found[case, W4A4], ours, bar
        if case in ("decode 4096", "decode 8 x 128") and ("decode 128", OURS) in found:
            yield ours, found["decode 128", OURS], "0.6" if case == "decode 4096" else "3"


def plot(rows: Rows, path: Path) -> None:
    """Draw tokens/s of every contender, one panel for each model and thread count."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((r["model"], r["threads"]) for r in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (model, threads) in zip(axes[0], panels, strict=True):
        mine = [r for r in rows if (r["model"], r["threads"]) == (model, threads)]
        names = list(dict.fromkeys(r["contender"] for r in mine))
        works = list(dict.fromkeys(r["case"] for r in mine))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            chosen = [r for r in mine if r["contender"] == name]
            places = [works.index(r["case"]) + i * width for r in chosen]
            axis.bar(places, [rate(r) for r in chosen], width, label=name)
        axis.set_xticks(np.arange(len(works)) + 0.4 - width / 2, works, fontsize=7)
        axis.set_yscale("log")
        axis.set_ylabel("tokens/s")
        axis.set_title(f"{model}, {threads} thread(s)")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
