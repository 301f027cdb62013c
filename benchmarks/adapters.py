"""What LoRA adapters cost that stay apart: a step of a batch with and without them, in turns.

    python -m benchmarks.adapters DIR [--threads 2] [--rank 16] [--batch 8] [--modules q_proj ...]

makes the 1B shape of ``random_llama.py`` in DIR and an adapter for each sequence of the batch, of
all linears or of those named, compiles them once, and prints the median seconds of a step and of a
prompt, the ratio of neighbouring ones with its quartiles, and the best of each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import amx_tvm
from benchmarks.random_llama import SHAPE, pool, write_huggingface

WIDTHS = {
    "q_proj": ("self_attn", "hidden_size", "hidden_size"),
    "k_proj": ("self_attn", "keys", "hidden_size"),
    "v_proj": ("self_attn", "keys", "hidden_size"),
    "o_proj": ("self_attn", "hidden_size", "hidden_size"),
    "gate_proj": ("mlp", "intermediate_size", "hidden_size"),
    "up_proj": ("mlp", "intermediate_size", "hidden_size"),
    "down_proj": ("mlp", "hidden_size", "intermediate_size"),
}
CONTEXT = 128


def write_adapter(place: Path, modules: Sequence[str], rank: int, seed: int) -> None:
    """Write a random adapter of the shape in PEFT's layout."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)
    sizes = {**SHAPE, "keys": SHAPE["num_key_value_heads"] * SHAPE["head_dim"]}
    tensors = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for module in modules:
            block, rows, columns = WIDTHS[module]
            stem = f"base_model.model.model.layers.{layer}.{block}.{module}"
            for letter, size in (("A", (rank, sizes[columns])), ("B", (sizes[rows], rank))):
                values = 0.01 * random.standard_normal(size)
                tensors[f"{stem}.lora_{letter}.weight"] = values.astype(np.float16)
    place.mkdir(parents=True)
    save_file(tensors, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (place / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def made(directory: Path, modules: Sequence[str], rank: int, count: int) -> Path:
    """Return an artifact of the shape with adapters, compiled at the first time."""
    output = directory / f"adapters-{count}-{rank}-{'-'.join(modules)}"
    if output.exists():
        return output
    base = directory / "hf"
    if not base.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_huggingface(base, pool())
    adapters = {}
    for index in range(count):
        place = directory / f"{output.name}-{index}"
        if not place.exists():
            write_adapter(place, modules, rank, index)
        adapters[f"a{index}"] = place
    amx_tvm.compile(base, adapters=adapters, output=output)
    return output


def steps(engine: Any, adapters: Sequence[str | None]) -> Callable[[], float]:
    """Return what times one token of a sequence for each adapter, and forgets it."""
    from amx_tvm.runtime.session import decode_batch

    sequences = [engine.sequence(adapter) for adapter in adapters]
    for index, sequence in enumerate(sequences):
        sequence.append([(7 * index + i) % 1000 for i in range(CONTEXT)])

    def run() -> float:
        start = time.perf_counter()
        decode_batch(sequences, [5] * len(sequences))
        taken = time.perf_counter() - start
        for sequence in sequences:
            sequence.rollback(1)
        return taken

    return run


def prompt(engine: Any, adapter: str | None, tokens: int = 512) -> Callable[[], float]:
    """Return what times a prompt."""

    def run() -> float:
        with engine.sequence(adapter) as sequence:
            start = time.perf_counter()
            sequence.append([i % 1000 for i in range(tokens)])
            return time.perf_counter() - start

    return run


def compare(
    name: str, base: Callable[[], float], other: Callable[[], float], rounds: int
) -> dict[str, Any]:
    """Time both in turns and return what was seen."""
    base(), other()
    pairs = []
    for i in range(rounds):
        if i % 2:
            second, first = other(), base()
        else:
            first, second = base(), other()
        pairs.append((first, second))
    times = np.array(pairs)
    low, middle, high = np.quantile(times[:, 1] / times[:, 0], (0.25, 0.5, 0.75))
    seconds, best = np.median(times, axis=0), times.min(axis=0)
    return {
        "what": name,
        "base_s": round(float(seconds[0]), 5),
        "adapters_s": round(float(seconds[1]), 5),
        "ratio": round(float(middle), 3),
        "quartiles": [round(float(low), 3), round(float(high), 3)],
        "best_s": [round(float(one), 5) for one in best],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--modules", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    given = parser.parse_args()
    path = made(given.directory, given.modules, given.rank, given.batch)
    engine: Any = amx_tvm.load(path, threads=given.threads, kv_tokens=16384, max_sequences=64)
    names = list(engine.adapters)
    found = [
        compare(f"{given.batch} sequences", *both, given.rounds)
        for both in [(steps(engine, [None] * given.batch), steps(engine, names))]
    ]
    one = steps(engine, [None]), steps(engine, names[:1])
    found.append(compare("1 sequence", *one, given.rounds))
    found.append(
        compare("prompt of 512", prompt(engine, None), prompt(engine, names[0]), given.rounds // 8)
    )
    for line in found:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
