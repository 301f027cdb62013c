"""Sampled tokens against the softmax that they are drawn from, by a chi-squared test."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import numpy as np

import amx_tvm
from amx_tvm.server.spelling import Spelling
from benchmarks.serving.contenders import ours
from benchmarks.serving.prompts import COMPLETIONS, Prompts, together

DRAWS = 10_000
TEXT = "My favourite colour is"
_LEAST = 5.0  # expected draws of a cell
_END = "the end"  # of a text, which has no entry of its own


def draws(args: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """Draw two tokens 10 000 times, sixteen at once, without a seed.

    The first token comes from a prompt's last row. The second one, which a step of all streams
    makes, is compared behind the likeliest first one.
    """
    from scipy.stats import chi2

    engine = amx_tvm.load(args.artifact, threads=args.threads)
    spelling = Spelling(engine.tokenizer)
    ids = engine.encode(TEXT)
    logits = [engine.logits(ids)[-1]]
    likeliest = int(np.argmax(logits[0]))
    logits.append(engine.logits([*ids, likeliest])[-1])
    engine.close()
    body = {"prompt": ids, "max_tokens": 2, "logprobs": 0, "temperature": 1}
    with ours(args.artifact, 16, args.threads) as server:
        told = together(server, COMPLETIONS, [body] * DRAWS)
    pairs = [
        (*json.loads(text)["choices"][0]["logprobs"]["tokens"], _END, _END)[:2] for _, text in told
    ]
    seen = [
        Counter(first for first, _ in pairs),
        Counter(second for first, second in pairs if first == spelling.text(likeliest)),
    ]
    row: dict[str, Any] = {}
    for name, counts, one in zip(("first", "second"), seen, logits, strict=True):
        statistic, freedom = _chi_squared(counts, one, spelling)
        p = float(chi2.sf(statistic, freedom))
        row[name] = {"draws": counts.total(), "chi2": statistic, "freedom": freedom, "p": p}
        print(
            f"{counts.total()} draws of the {name} token at 16 streams: chi-squared "
            f"{statistic:.1f} with {freedom} degrees of freedom, p {p:.3f}",
            flush=True,
        )
    return row


def _chi_squared(seen: Counter[str], logits: np.ndarray, spelling: Spelling) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom; rare tokens share a cell."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    expected = seen.total() * weights / weights.sum()
    cells: Counter[str] = Counter()
    for token in np.flatnonzero(expected >= _LEAST).tolist():
        cells[spelling.text(token)] += expected[token]
    pairs = [(seen[text], count) for text, count in cells.items()]
    rest = seen.total() - cells.total()
    pairs.append((seen.total() - sum(one for one, _ in pairs), rest))
    return sum((one - count) ** 2 / count for one, count in pairs), len(pairs) - 1
