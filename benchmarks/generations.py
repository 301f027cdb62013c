"""Many generations by threads that come and go, a third of them left midway: what stays behind.

    python -m benchmarks.generations ARTIFACT [--generations 10000] [--threads 50] [--tokens 4]

Every so often a line with the process's memory, threads, sequences and free pages of the cache; at
the end how many texts differ from those that one thread got before, which is 0 for an artifact that
was compiled with `--strict`, and 1 as exit code where something grew.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import amx_tvm.runtime

PROMPTS = ("The capital of France is", "Once upon a time", "def add(a, b):", "Seven times six")
LINES = 10
GROWTH_BYTES = 8 << 20  # what the allocator's rest may differ by between two looks


@dataclass(frozen=True)
class Look:
    """What a process holds: bytes, threads, live sequences, tokens that the cache has room for."""

    generations: int
    resident: int
    threads: int
    sequences: int
    free_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.generations:6d} generations: {self.resident / 1e6:7.1f} MB, "
            f"{self.threads} threads, {self.sequences} sequences, {self.free_tokens} tokens free"
        )


def look(engine: Any, generations: int) -> Look:
    """Look at this process, between two generations."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    sequences, free = engine.call(
        lambda: (engine._cache.sequences, engine._cache.available_tokens())
    )
    threads = min(_threads() for _ in range(20))
    return Look(generations, pages * os.sysconf("SC_PAGE_SIZE"), threads, sequences, free)


def run(
    engine: Any,
    generations: int,
    threads: int,
    tokens: int = 4,
    tell: Callable[[Look], None] = lambda _: None,
) -> tuple[list[Look], int]:
    """Generate by threads that make one generation each and end; every third stream is left.

    Parameters
    ----------
    engine : amx_tvm.runtime.Engine
    generations : int
        Altogether.
    threads : int
        How many are alive at a time.
    tokens : int
        Of a generation that is not left.
    tell : callable, optional
        Called with each look.

    Returns
    -------
    looks : list of Look
        The first one after a tenth of the work, when everything has been used once.
    wrong : int
        Texts that one thread alone did not get.
    """
    expected = [engine.generate(p, tokens, ignore_eos=True).token_ids for p in PROMPTS]
    wrong: list[int] = []

    def work(number: int) -> None:
        prompt = number % len(PROMPTS)
        if number % 3 == 2:
            for _ in engine.stream(PROMPTS[prompt], 100, ignore_eos=True):
                return
        elif (
            engine.generate(PROMPTS[prompt], tokens, ignore_eos=True).token_ids != expected[prompt]
        ):
            wrong.append(number)

    looks: list[Look] = []
    done = 0
    for part in range(LINES):
        end = generations * (part + 1) // LINES
        while done < end:
            count = min(threads, end - done)
            crowd = [threading.Thread(target=work, args=(done + i,)) for i in range(count)]
            for thread in crowd:
                thread.start()
            for thread in crowd:
                thread.join()
            done += count
        looks.append(look(engine, done))
        tell(looks[-1])
    return looks, len(wrong)


def _threads() -> int:
    """Count the process's threads, a moment later: one that was joined takes that long to leave."""
    time.sleep(0.005)
    return len(os.listdir("/proc/self/task"))


def grown(looks: list[Look]) -> list[str]:
    """Say what grew between the first look and the last."""
    first, last = looks[0], looks[-1]
    found = []
    if last.resident - first.resident > GROWTH_BYTES:
        found.append(f"memory by {(last.resident - first.resident) / 1e6:.1f} MB")
    if last.threads > first.threads:
        found.append(f"threads from {first.threads} to {last.threads}")
    if last.sequences or last.free_tokens != first.free_tokens:
        found.append(f"{last.sequences} sequences, room for {last.free_tokens} tokens is left")
    return found


def main() -> None:
    """Print looks and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--generations", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=4)
    options = parser.parse_args()
    engine = amx_tvm.runtime.load(options.artifact)
    looks, wrong = run(
        engine, options.generations, options.threads, options.tokens, partial(print, flush=True)
    )
    problems = grown(looks) + ([f"{wrong} texts differ"] if wrong else [])
    print("grew: " + ", ".join(problems) if problems else "flat; all texts equal", flush=True)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
