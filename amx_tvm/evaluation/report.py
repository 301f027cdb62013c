"""Results for people and programs: a table, JSON, and a plot of bits against perplexity."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from amx_tvm.errors import EvaluationError
from amx_tvm.evaluation.layers import LayerError, by_layer
from amx_tvm.evaluation.measure import Result
from amx_tvm.extras import plotting

COLUMNS = ("name", "bits", "perplexity", "+-", "above", "KL", "top-1", "accuracy", "seconds")


def rows(results: Sequence[Result], baseline: float | None = None) -> list[tuple[str, ...]]:
    """Return the cells of a comparison, one row a result, in the order of COLUMNS.

    baseline : perplexity that "above" refers to; without it the column stays empty
    """
    return [
        (
            r.name,
            _number(r.bits, "{:.2f}"),
            f"{r.perplexity:.3f}",
            _number(r.stderr, "{:.2f}"),
            "" if baseline is None else f"{100 * (r.perplexity / baseline - 1):+.1f} %",
            _number(r.kl, "{:.4f}"),
            _number(r.top1, "{:.4f}"),
            f"{r.accuracy:.4f}",
            f"{r.seconds:.1f}",
        )
        for r in results
    ]


def table(results: Sequence[Result], baseline: float | None = None) -> str:
    """Return a plain text table; columns without any value are left out."""
    body = [COLUMNS, *rows(results, baseline)]
    kept = [i for i in range(len(COLUMNS)) if any(row[i] for row in body[1:])]
    return _aligned([[row[i] for i in kept] for row in body])


def layer_table(layers: Sequence[LayerError], most: int = 10) -> str:
    """Return the linears that suffer most, worst first, by their mean error over formats."""
    names = list(layers[0].errors) if layers else []
    worst = sorted(layers, key=lambda one: -sum(one.errors.values()))[:most]
    body = [("linear", *names)]
    body += [(one.name, *(f"{one.errors[n]:.5f}" for n in names)) for one in worst]
    return _aligned(body)


def to_json(
    results: Sequence[Result], settings: Mapping[str, Any], layers: Sequence[LayerError] = ()
) -> str:
    """Return a JSON document: the settings, the results, and layer errors where measured."""
    document = {
        "settings": dict(settings),
        "results": [result.to_dict() for result in results],
        "layers": [asdict(layer) for layer in layers],
    }
    return json.dumps(document, indent=1)


def curves(layers: Sequence[LayerError]) -> dict[str, list[float]]:
    """Return the mean error of each layer by format, for `plot`."""
    names = list(layers[0].errors) if layers else []
    return {name: by_layer(layers, name) for name in names}


def plot(
    results: Sequence[Result],
    path: str | os.PathLike[str],
    layers: Mapping[str, Sequence[float]] | None = None,
    baseline: float | None = None,
) -> None:
    """Draw bits against perplexity, and errors by layer where they are given.

    Parameters
    ----------
    results : those with known `bits` are drawn
    path : .png, .svg or .pdf
    layers : format or model name -> one error for each layer
    baseline : perplexity drawn as a line

    Raises
    ------
    EvaluationError
        When matplotlib is missing, there is nothing to draw, or the suffix is unknown.
    """
    figures = plotting(path, EvaluationError)
    known = [r for r in results if r.bits is not None]
    if not known and not layers:
        raise EvaluationError("there is nothing to draw: no result with known bits, no layers")
    panels = bool(known) + bool(layers)
    figure = figures.Figure(figsize=(6 * panels, 4.5), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    if known:
        axis = next(axes)
        for r in known:
            axis.errorbar([r.bits], [r.perplexity], yerr=[r.stderr], fmt="o", capsize=3)
            axis.annotate(r.name, (r.bits, r.perplexity), xytext=(6, 4), textcoords="offset points")
        if baseline is not None:
            axis.axhline(baseline, linestyle="--", linewidth=1, color="gray", label="reference")
            axis.legend()
        axis.set(xlabel="stored bits a weight", ylabel="perplexity")
        axis.margins(x=0.25)
    if layers:
        axis = next(axes)
        for name, errors in layers.items():
            axis.plot(range(len(errors)), errors, marker=".", label=name)
        axis.set(xlabel="layer", ylabel="relative error", yscale="log")
        axis.legend()
    figure.savefig(path, dpi=150)


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None or value != value else pattern.format(value)


def _aligned(body: Sequence[Sequence[str]]) -> str:
    """Lines of equally wide columns, the first one flush left."""
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = []
    for first, *rest in body:
        cells = [cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
