"""Many sequences on a GPU: right rows, then tokens/s over sizes and contexts, and a whole workload.

    python -m benchmarks.gpu.models build --out build/models --arch sm_90a --model llama-8b
    python -m benchmarks.gpu.batches --out build/models --model llama-8b --json batches.json
        [--sizes 8 16 64] [--contexts 128 1024] [--workload 512 128 128] [--check] [--profile]

A step is what `Engine.generate_batch` does: the device chooses the tokens and starts the next step
from them while the host looks. ``--profile`` adds what the step's kernels take alone, back to back
in their CUDA graph. ``--check`` compares the logits of every row with those of its sequence alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.models import CHUNK, RandomModel

LENGTHS = (1, 15, 16, 17, 100, 128, 300, 1000, 2500, 8000)
TOLERANCE = 3e-3


def prefill(model: RandomModel, contexts: list[int]) -> list[Any]:
    """Return sequences that hold so many tokens each, computed together."""
    engine, sequences, part, rows = model.engine, [], [], 0
    tokens = np.asarray(model.tokens)

    def run() -> None:
        nonlocal rows
        if part:
            lengths = [len(ids) for _, ids in part]
            handles = [s.handle for s, _ in part]
            flat = np.concatenate([ids for _, ids in part])
            engine._model.forward(part[0][0]._cache, handles, lengths, flat, [0] * len(part))
            for sequence, ids in part:
                sequence.tokens.extend(ids.tolist())
        part.clear()
        rows = 0

    for i, context in enumerate(contexts):
        sequence = engine.sequence()
        sequences.append(sequence)
        ids = np.roll(tokens, -i)[:context]
        for start in range(0, context, CHUNK):
            piece = ids[start : start + CHUNK]
            if rows + len(piece) > CHUNK or (part and part[-1][0] is sequence):
                run()
            part.append((sequence, piece))
            rows += len(piece)
    run()
    return sequences


def check(model: RandomModel, sizes: tuple[int, ...] = (1, 7, 64, 200)) -> dict[str, float]:
    """Largest relative difference of a row's logits from those of its sequence alone."""
    from amx_tvm.runtime import session

    engine = model.engine
    errors: dict[str, float] = {}

    def difference(rows: np.ndarray, sequences: list[Any], token: int) -> float:
        worst = 0.0
        chosen = range(len(sequences)) if len(sequences) < 65 else range(0, len(sequences), 9)
        for i in chosen:
            fork = sequences[i].fork(len(sequences[i]) - 1)
            alone = fork.append([token])
            fork.close()
            worst = max(worst, float(np.linalg.norm(rows[i] - alone) / np.linalg.norm(alone)))
        return worst

    def run() -> None:
        for size in sizes:
            contexts = [LENGTHS[i % len(LENGTHS)] for i in range(size)]
            sequences = prefill(model, contexts)
            rows = session.decode_batch(sequences, [7] * size)
            errors[f"{size} sequences"] = difference(rows, sequences, 7)
            if size >= 7:
                for sequence in sequences[:3]:
                    sequence.rollback(len(sequence) // 2)
                forks = [sequences[5].fork(), sequences[5].fork(), sequences[6].fork(70)]
                mixed = [*sequences[:6], *forks]
                rows = session.decode_batch(mixed, [9] * len(mixed))
                key = f"{size} sequences, rolled back and forked"
                errors[key] = difference(rows, mixed, 9)
                for fork in forks:
                    fork.close()
            chosen = session.choose_batch(sequences, [11] * size)
            for _ in range(3):
                follow = session.choose_batch(sequences, chosen)
                again = []
                for sequence, token in zip(sequences[:8], chosen, strict=False):
                    with sequence.fork(len(sequence) - 1) as fork:
                        again.append(int(np.argmax(fork.append([token]))))
                same = sum(a == b for a, b in zip(again, follow, strict=False))
                errors.setdefault(f"{size} sequences, other choices", 0.0)
                errors[f"{size} sequences, other choices"] += len(again) - same
                chosen = follow
            for sequence in sequences:
                sequence.close()

    engine.call(run)
    return errors


def decode_speed(
    model: RandomModel, size: int, context: int, drawn: bool = False, steps: int = 48
) -> dict[str, float]:
    """Milliseconds a step and tokens/s, the device choosing the tokens; median of three."""
    from amx_tvm.runtime import session
    from amx_tvm.runtime.choices import RowChoice
    from amx_tvm.runtime.options import Sampling

    sampling = Sampling(temperature=0.8, top_p=0.95) if drawn else Sampling()
    choices = [RowChoice(sampling, np.random.default_rng(i)) for i in range(size)]

    def run() -> list[float]:
        sequences = prefill(model, [context - steps // 2] * size)
        tokens = [5] * size
        times = []
        for _repeat in range(4):
            start = time.perf_counter()
            for _ in range(steps):
                tokens = session.choose_batch(sequences, tokens, None, choices)
            times.append((time.perf_counter() - start) / steps)
            for sequence in sequences:
                sequence.rollback(steps)
        for sequence in sequences:
            sequence.close()
        return times[1:]

    seconds = float(np.median(model.engine.call(run)))
    return {"ms": seconds * 1e3, "tokens/s": size / seconds}


def kernels(model: RandomModel, size: int, context: int) -> tuple[float, list[tuple[str, float]]]:
    """Milliseconds of the GPU's work in a step, first kernel to last, and its parts in us."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    from amx_tvm.runtime import session

    steps = 8

    def run() -> Any:
        sequences = prefill(model, [context] * size)
        tokens = [5] * size
        for _ in range(4):
            tokens = session.choose_batch(sequences, tokens)
        with record(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(steps):
                tokens = session.choose_batch(sequences, tokens)
            sequences[0].rollback(1)
        for sequence in sequences:
            sequence.close()
        return recorded

    recorded = model.engine.call(run)
    events = sorted(
        (e for e in recorded.events() if e.device_type.name == "CUDA"),
        key=lambda e: e.time_range.end,
    )
    spans: dict[str, float] = {}
    total = 0.0
    for before, event in zip(events, events[1:], strict=False):
        span = event.time_range.end - max(before.time_range.end, event.time_range.start)
        spans[event.name] = spans.get(event.name, 0.0) + span / steps
        total += span / steps
    return total / 1e3, sorted(spans.items(), key=lambda item: -item[1])


def prefill_speed(model: RandomModel, size: int, context: int, repeats: int = 5) -> float:
    """Median milliseconds of so many prompts in as few calls as they take."""

    def run() -> float:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            sequences = prefill(model, [context] * size)
            model.engine._machine.to_host(model.engine._machine.to_device(np.zeros(1)))
            times.append(time.perf_counter() - start)
            for sequence in sequences:
                sequence.close()
        return float(np.median(times[1:])) * 1e3

    return model.engine.call(run)


def workload(model: RandomModel, requests: int, inputs: int, outputs: int) -> dict[str, float]:
    """Output tokens/s of requests that arrive at once."""
    tokens = np.asarray(model.tokens)
    prompts = [np.roll(tokens, -7 * i)[:inputs].tolist() for i in range(requests)]
    start = time.perf_counter()
    results = model.engine.generate_batch(prompts, outputs, ignore_eos=True)
    seconds = time.perf_counter() - start
    made = sum(len(r.token_ids) for r in results)
    return {"seconds": seconds, "tokens": made, "tokens/s": made / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--sizes", type=int, nargs="+", default=[])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--workload", type=int, nargs=3, metavar=("N", "IN", "OUT"))
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256 * 1152)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = RandomModel(args.out, args.model, args.sequences, args.tokens)
    result: dict[str, Any] = {"model": args.model}
    if args.check:
        result["errors"] = check(model)
        print(f"{args.model}: {result['errors']}", flush=True)
    for context in args.contexts:
        for size in args.sizes:
            found: dict[str, Any] = dict(decode_speed(model, size, context))
            drawn = decode_speed(model, size, context, True)
            found["tokens/s drawn"] = drawn["tokens/s"]
            if args.profile:
                found["kernels ms"], parts = kernels(model, size, context)
                found["kernels"] = parts[:14]
            result[f"{size} at {context}"] = found
            shown = {k: round(v, 3) for k, v in found.items() if k != "kernels"}
            print(f"{args.model}: {size} sequences at {context}: {shown}", flush=True)
            for name, us in found.get("kernels", []):
                print(f"    {us:9.1f} us  {name[:90]}")
    if args.prefill:
        for size, context in ((1, 128), (1, 2048), (16, 128), (64, 128)):
            milliseconds = prefill_speed(model, size, context)
            result[f"prefill {size} x {context}"] = milliseconds
            print(f"{args.model}: prefill {size} x {context}: {milliseconds:.2f} ms", flush=True)
    if args.workload:
        for _ in range(2):
            result["workload"] = workload(model, *args.workload)
        print(f"{args.model}: workload {args.workload}: {result['workload']}", flush=True)
    if args.json:
        import torch

        document = {"device": torch.cuda.get_device_name(), "results": result}
        args.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
