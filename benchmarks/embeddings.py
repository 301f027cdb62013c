"""Embeddings a second, against sentence-transformers on the same texts and threads.

    python benchmarks/embeddings.py DIRECTORY --threads 2

DIRECTORY holds a model as sentence-transformers keeps it. Texts are of random words of its
vocabulary: many short ones, some long ones, and one at a time. Both run in turn, tokenizing
included; medians and quartiles of the ratios are printed, and the least cosine between them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import amx_tvm

ROUNDS = 9
WORKLOADS = {"256 of 12 words": (256, 12), "32 of 120 words": (32, 120), "one of 12 words": (1, 12)}


def texts(directory: Path, count: int, words: int) -> list[str]:
    """Return texts of random whole words of the model's vocabulary."""
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    known = sorted(word for word in vocabulary if word.isalpha() and word.isascii())
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(known, words)) for _ in range(count)]


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Compile the model, and print a line for each workload."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--quantization", default="amxfp4")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(asked.threads)
    peer = SentenceTransformer(str(asked.directory), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "artifact"
        amx_tvm.compile(asked.directory, quantization=asked.quantization, output=place)
        engine = amx_tvm.load(place, threads=asked.threads)
        for name, shape in WORKLOADS.items():
            given = texts(asked.directory, *shape)
            ours = lambda given=given: engine.embed(given, truncate=True)  # noqa: E731
            theirs = lambda given=given: peer.encode(given, show_progress_bar=False)  # noqa: E731
            cosine = (ours() * theirs()).sum(1).min()
            pairs = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
            low, middle, high = statistics.quantiles([b / a for a, b in pairs])
            rate = len(given) / statistics.median(a for a, _ in pairs)
            print(
                f"{name}: {rate:.0f} a second, {middle:.2f} ({low:.2f}-{high:.2f}) times "
                f"sentence-transformers, cosine {cosine:.4f} at least",
                flush=True,
            )


if __name__ == "__main__":
    main()
