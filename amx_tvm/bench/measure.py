"""Speed of one artifact on this machine: prefill, decode, batches, memory traffic, loading.

A decode step has to read every weight once and the keys and values of every cached token, so its
floor is those bytes over the read bandwidth; `share` says how near it comes. Random tokens are
used: the time does not depend on them. Sampling takes part in `first_token_s` only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.artifact import Manifest
from amx_tvm.bench import memory
from amx_tvm.errors import GenerationError
from amx_tvm.runtime import Engine, load
from amx_tvm.runtime.budget import kv_bytes
from amx_tvm.runtime.library import set_threads
from amx_tvm.runtime.session import Sequence as Cached
from amx_tvm.runtime.session import decode_batch

_ROW_TABLES = ("embed_tokens", "wte", "wpe")  # of these a step reads a row


@dataclass(frozen=True)
class Prefill:
    """Time of a prompt: median, with the quartiles of tokens/s."""

    tokens: int
    tokens_per_s: float
    quartiles: tuple[float, float]
    first_token_s: float


@dataclass(frozen=True)
class Decode:
    """Time of decode steps; ``share`` is None where the bandwidth is not measured (GPUs)."""

    context: int
    batch: int
    tokens_per_s: float
    quartiles: tuple[float, float]
    bytes_per_token: int
    gb_per_s: float
    share: float | None


@dataclass(frozen=True)
class Report:
    """Everything that `bench` measures; sizes in bytes, times in seconds."""

    artifact: str
    model: str
    format: str
    device: str
    threads: int
    load_s: float
    peak_bytes: int
    read_bandwidth: float | None
    token_bytes: int  # of the KV cache
    prefill: list[Prefill]
    decode: list[Decode]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return asdict(self)


def weight_bytes(manifest: Manifest) -> int:
    """Return the bytes of parameters that one decode step reads.

    All of them, less the tables of which it reads a row: position tables, and the token embedding
    unless the LM head is tied to it. Adapters are read by rows that ask for one only.
    """
    tied = manifest.model["config"].get("tie_word_embeddings", False)
    tables = ("adapters", *(("wpe",) if tied else _ROW_TABLES))
    return sum(
        tensor.bytes
        for name, tensor in manifest.parameters.tensors.items()
        if not any(f"{table}." in name for table in tables)
    )


def bench(
    path: Path | str,
    prompts: Sequence[int] = (512,),
    contexts: Sequence[int] = (128, 1024),
    batches: Sequence[int] = (1, 8),
    steps: int = 16,
    repeats: int = 5,
    device: str | None = None,
    threads: int | None = None,
) -> Report:
    """Measure an artifact.

    Parameters
    ----------
    path : Path or str
        The artifact of a language model.
    prompts : sequence of int
        Prompt lengths in tokens for prefill and time to first token.
    contexts : sequence of int
        Cached tokens of each sequence before the decode steps that are timed.
    batches : sequence of int
        Sequences decoded at once.
    steps : int
        Decode steps a repeat.
    repeats : int
        Medians are taken over so many; one more warms up.
    device, threads
        As in `amx_tvm.load`.

    Raises
    ------
    AmxError
        An artifact that does not load, is no language model, or has too short a context.
    """
    for name, values in (("prompt", prompts), ("context", contexts), ("batch", batches)):
        if not values or min(values) < 1:
            raise GenerationError(f"{name} is {list(values)}, expected numbers of at least 1")
    if steps < 1 or repeats < 1:
        raise GenerationError(f"steps is {steps}, repeats {repeats}; expected at least 1 each")
    longest = max(*prompts, max(contexts) + steps)
    start = time.perf_counter()
    engine = load(
        path,
        device=device,
        threads=threads,
        context_length=longest,
        max_sequences=max(batches) + 1,
        kv_tokens=(max(batches) + 1) * (longest + 64),  # a page more a sequence
    )
    if not isinstance(engine, Engine):
        raise GenerationError(f"{path} is a compiled function, not a language model")
    load_s = time.perf_counter() - start
    random = np.random.default_rng(0)
    # On the engine's thread: nothing is handed over in a step.
    prefill = [engine.call(_prefill, engine, random, count, repeats) for count in prompts]
    timed = [
        (context, batch, engine.call(_decode, engine, random, context, batch, steps, repeats))
        for context in contexts
        for batch in batches
    ]
    peak = memory.peak_memory()  # before the buffer that the bandwidth is measured with
    count = set_threads(threads)
    where = device or engine.manifest.target.device
    bandwidth = memory.read_bandwidth(count) if where == "cpu" else None
    weights, token = weight_bytes(engine.manifest), kv_bytes(engine.manifest)
    decode = []
    for context, batch, seconds in timed:
        moved = weights // batch + token * (context + steps // 2)
        rate, low, high = _rates(batch * steps, seconds)
        decode.append(
            Decode(
                context,
                batch,
                rate,
                (low, high),
                moved,
                rate * moved / 1e9,
                rate * moved / bandwidth if bandwidth else None,
            )
        )
    return Report(
        str(path),
        str(engine.manifest.model.get("name", "")),
        str(engine.manifest.quantization.get("format", "")),
        where,
        count,
        load_s,
        peak,
        bandwidth,
        token,
        prefill,
        decode,
    )


def _tokens(engine: Engine, random: np.random.Generator, count: int) -> list[int]:
    return random.integers(0, int(engine.manifest.model["vocab_size"]), count).tolist()


def _prefill(engine: Engine, random: np.random.Generator, count: int, repeats: int) -> Prefill:
    tokens = _tokens(engine, random, count)
    seconds, first = [], []
    for _ in range(repeats + 1):
        with engine.sequence() as sequence:
            start = time.perf_counter()
            logits = sequence.append(tokens)
            seconds.append(time.perf_counter() - start)
            int(np.argmax(logits))
            first.append(time.perf_counter() - start)
    rate, low, high = _rates(count, seconds[1:])
    return Prefill(count, rate, (low, high), float(np.median(first[1:])))


def _decode(
    engine: Engine,
    random: np.random.Generator,
    context: int,
    batch: int,
    steps: int,
    repeats: int,
) -> list[float]:
    """Return seconds for ``steps`` decode steps, one number a repeat."""
    sequences: list[Cached] = []
    try:
        for _ in range(batch):
            sequences.append(engine.sequence())
            sequences[-1].append(_tokens(engine, random, context))
        tokens = _tokens(engine, random, batch)
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for _ in range(steps):
                decode_batch(sequences, tokens)
            seconds.append(time.perf_counter() - start)
            for sequence in sequences:
                sequence.rollback(steps)
        return seconds[1:]
    finally:
        for sequence in sequences:
            sequence.close()


def _rates(tokens: int, seconds: list[float]) -> tuple[float, float, float]:
    """Return tokens/s: median and quartiles."""
    low, middle, high = np.quantile(tokens / np.array(seconds), [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)
