"""Facts planted in a text and asked for behind it, by depth, with several caches of one model.

    python -m benchmarks.planted_fact MODEL [--tokens 1000 2000] [--caches float16 amxfp4]

A window of a text gets a number for each of five cities, at a tenth, three tenths and so on of it:
"The secret number of Paris is 48213." It goes into the engine in chunks, as a server's prompts do,
so later ones read earlier ones as the cache keeps them; each question is asked in a fork at its
end, as the sentence's beginning. Printed is by depth how many numbers are the likeliest digits of
all, and the mean log-probability of the number, nats. Weights are those of ``--quantization`` with
every cache, and so are windows, numbers and chunks.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import amx_tvm
from benchmarks import accuracy_texts

CITIES = ("Paris", "Cairo", "Lima", "Oslo", "Tokyo")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
CHUNK = 256
QUESTION = "\nThe secret number of {} is"
BEHIND = 40  # lines between the windows of a text


def trials(
    engine: Any, text: str, tokens: int, count: int
) -> Iterable[tuple[list[int], list[tuple[list[int], list[int]]]]]:
    """Yield windows of so many tokens with facts, and what is asked and answered by depth."""
    rng, lines = np.random.default_rng(tokens), text.splitlines()

    def ids(part: str) -> list[int]:
        return engine.tokenizer.encode(part, add_special_tokens=False).ids

    for number in range(count):
        cities = rng.permutation(CITIES)
        secrets = [" " + "".join(map(str, rng.integers(0, 10, 5))) for _ in cities]
        questions = [ids(QUESTION.format(city)) for city in cities]
        filler = engine.encode("\n".join(lines[number * BEHIND :]))
        window: list[int] = []
        asked = []
        for depth, question, secret in zip(DEPTHS, questions, secrets, strict=True):
            window += filler[len(window) : int(depth * tokens)]
            answer = ids(secret)
            window += question + answer + ids(".\n")
            asked.append((question, answer))
        yield window + filler[len(window) : tokens], asked


def main() -> None:
    """Compile with every cache, ask and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--caches", nargs="+", default=["float16", "amxfp4"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 2000])
    parser.add_argument("--trials", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for cache in given.caches:
            output = Path(place) / cache
            amx_tvm.compile(
                given.model, quantization=given.quantization, kv_cache=cache, output=output
            )
            most = max(given.tokens) + 256
            engine: Any = amx_tvm.load(output, context_length=most, max_sequences=3)
            for tokens in given.tokens:
                measure(engine, cache, tokens, given.trials)


def measure(engine: Any, cache: str, tokens: int, count: int) -> None:
    """Print what is found of the facts in windows of so many tokens."""
    right, logs = np.zeros((2, count, len(DEPTHS)))
    for trial, (window, asked) in enumerate(
        trials(engine, accuracy_texts.opticks(), tokens, count)
    ):
        with engine.sequence() as story:
            for start in range(0, len(window), CHUNK):
                story.append(window[start : start + CHUNK])
            for depth, (question, answer) in enumerate(asked):
                right[trial, depth], logs[trial, depth] = answered(story, question, answer)
    shares = " ".join(f"{int(n)}" for n in right.sum(0))
    means = " ".join(f"{x:.2f}" for x in logs.mean(0))
    print(
        f"{cache} {tokens} tokens: {shares} of {count} by depth, {int(right.sum())} of "
        f"{right.size}; log-probability {means}, {logs.mean():.3f}",
        flush=True,
    )


def answered(story: Any, question: list[int], answer: list[int]) -> tuple[bool, float]:
    """Whether an answer is the likeliest in a fork, token by token, and its log-probability."""
    right, log = True, 0.0
    with story.fork() as asked:
        logits = np.asarray(asked.append(question), np.float64)
        for token in answer:
            right = right and int(logits.argmax()) == token
            log += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            logits = np.asarray(asked.append([token]), np.float64)
    return right, log


if __name__ == "__main__":
    main()
