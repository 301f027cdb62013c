"""`amx-tvm inspect`: what an artifact holds, from its manifest alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amx_tvm.artifact import Manifest, artifact_bytes, verify_artifact
from amx_tvm.artifact.verify import Verify
from relax_passes.chosen import ChosenKernel, chosen_kernels

if TYPE_CHECKING:
    from amx_tvm.cli.inspect_sizes import Roof

_LAYER = re.compile(r"\.(\d+)\.")
_COUNTED = ("bits_per_weight", "bits_by_format", "weights")
_COLUMNS = ("name", "format", "shape", "M", "kernel", "rows", "why")


def run(artifact: Path, every: bool, as_json: bool, verify: Verify | bool) -> None:
    """Print the manifest as tables, or as JSON.

    Without ``verify`` the files are not looked at, so artifacts for other machines are shown too.
    """
    manifest = verify_artifact(artifact, verify) if verify else Manifest.load(artifact)
    if as_json:
        data = manifest.to_dict()
        data["bytes"] = {
            "artifact": artifact_bytes(artifact),
            "parameters": manifest.parameters.bytes,
            "library": manifest.library.bytes,
        }
        print(json.dumps(data, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # wide enough that no cell of a file or pipe is cut
        console = Console(width=220)
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in _facts(artifact, manifest):
        facts.add_row(name, value)
    console.print(facts, highlight=False)
    if not manifest.linears:
        return
    table = Table(title="Linears", title_justify="left", header_style="bold")
    for column in (*_COLUMNS, "count")[: None if not every else -1]:
        number = column in ("shape", "count")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row, count in rows(chosen_kernels(manifest.linears), every):
        table.add_row(*row, *([] if every else [str(count)]))
    console.print(table, highlight=False)


def run_page(artifact: Path, output: Path, model: str | None, verify: Verify | bool) -> None:
    """Write the page of an artifact; with its model also the errors of its weights."""
    from amx_tvm.artifact.publication import Publication
    from amx_tvm.bench.measure import weight_bytes
    from amx_tvm.cli.inspect_page import page
    from amx_tvm.cli.inspect_sizes import floors, layer_sizes
    from amx_tvm.runtime.budget import kv_bytes

    manifest = verify_artifact(artifact, verify) if verify else Manifest.load(artifact)
    kernels = chosen_kernels(manifest.linears)
    linears = list({kernel.name: kernel for kernel in kernels}.values())  # once, for any rows
    with Publication(output, "choose another --html") as new:
        errors = _errors(model, str(manifest.quantization.get("format", "none"))) if model else {}
        steps, roof = [], None
        if manifest.kind == "causal_lm" and manifest.target.device == "cpu":
            roof = _roof(exact=all(kernel.spec.activation.exact for kernel in linears))
            longest = int(manifest.model["context_length"])
            contexts = [0, *(c for c in (512, 1024, 2048, 4096, 8192) if c <= longest)]
            weights, token = weight_bytes(manifest), kv_bytes(manifest)
            steps = floors(linears, weights, token, contexts, roof)
        new.path.write_text(
            page(
                str(manifest.model.get("name", artifact)),
                _facts(artifact, manifest),
                layer_sizes(manifest, linears),
                rows(kernels, every=False),
                _COLUMNS,
                steps,
                roof,
                errors,
            ),
            encoding="utf-8",
        )
        new.publish(replace=output.is_file())
    print(output)


def _roof(exact: bool) -> Roof:
    """Measure what this machine gives to linears that read float32 x, or bytes."""
    from amx_tvm.bench.arithmetic import peak_operations
    from amx_tvm.bench.memory import read_bandwidth
    from amx_tvm.cli.inspect_sizes import Roof
    from amx_tvm.runtime.library import physical_cores

    cores = physical_cores()
    products = "float32" if exact else "bytes"
    return Roof(read_bandwidth(cores), peak_operations(cores, exact), products)


def _errors(model: str, made: str) -> dict[str, float]:
    """Return the relative squared error of the weights of every layer of a model in a format."""
    from amx_tvm.evaluation import by_layer, weight_errors
    from amx_tvm.frontends import open_model

    if made == "none":
        return {}
    found = by_layer(list(weight_errors(open_model(model), [made])), made)
    return {f"layer {number}": error for number, error in enumerate(found)}


def run_emit(artifact: Path, level: str, kernel: str | None) -> None:
    """Print one kernel of the artifact at one level of its lowering."""
    from amx_tvm.compiler.emit import emit

    print(emit(Manifest.load(artifact), level, kernel))


def _facts(artifact: Path, manifest: Manifest) -> Iterable[tuple[str, str]]:
    model, target, versions = manifest.model, manifest.target, manifest.versions
    yield "artifact", f"{artifact} ({manifest.kind}, schema {manifest.schema})"
    if model:
        context = model.get("context_length")
        text = f"{model.get('name', '?')} ({model.get('family', '?')})"
        yield "model", text + (f", context {context} tokens" if context else "")
    if names := model.get("adapters"):
        stored = manifest.parameters.tensors.items()
        size = sum(record.bytes for name, record in stored if name.startswith("adapters."))
        yield "adapters", f"{', '.join(names)}; {size / 1e6:.1f} MB together"
    yield "target", f"{' and '.join(manifest.targets)} on {target.device}"
    if target.features:
        yield "needs", " ".join(target.features)
    settings = manifest.quantization
    if settings:
        shown = {k: v for k, v in settings.items() if k not in _COUNTED and v}
        yield "quantization", ", ".join(f"{key} {_text(value)}" for key, value in shown.items())
    if "bits_per_weight" in settings:
        parts = [f"{k} {v:.3f}" for k, v in settings.get("bits_by_format", {}).items()]
        split = f" ({', '.join(parts)})" if parts else ""
        yield "bits per weight", f"{settings['bits_per_weight']:.3f}{split}, scales included"
    kept = manifest.parameters
    held = f"{len(kept.order)} tensors in {len(kept.shards)} shards"
    yield "parameters", f"{kept.bytes / 1e6:.1f} MB, {held}"
    yield "library", f"{manifest.library.bytes / 1e6:.2f} MB"
    yield "on disk", f"{artifact_bytes(artifact) / 1e6:.1f} MB"
    cache = manifest.kv_cache
    if cache:
        yield "KV cache", _cache(manifest)
    yield "made by", f"amx_tvm {versions.amx_tvm}, TVM {versions.tvm}, tvm_ffi {versions.tvm_ffi}"


def _cache(manifest: Manifest) -> str:
    """Say what keys and values are, and how much room tokens take."""
    from amx_tvm.runtime.budget import kv_bytes, sequence_bytes

    cache, token, each = manifest.kv_cache, kv_bytes(manifest), sequence_bytes(manifest)
    fits = (1 << 30) // token
    text = f"{token / 1024:.1f} KiB a token, {fits} tokens a GiB"
    if "packed" not in cache:
        return f"{cache['dtype']}, {text}"
    packed = cache["packed"]
    return (
        f"{packed['format']}, {text}; the newest {packed['newest']} tokens of a sequence and the "
        f"first {packed['first']} in 16 bits, {each / 1024:.0f} KiB"
    )


def _cells(linear: ChosenKernel) -> tuple[str, ...]:
    """Return what a linear has in the columns behind its name."""
    spec = linear.spec
    parts = ", ".join(f"{first}: {kernel}" for first, kernel in linear.rows.items())
    size = f"{spec.n} x {spec.k}"
    return (spec.format, size, str(spec.rows), linear.kernel, parts, linear.why)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def rows(linears: Iterable[ChosenKernel], every: bool) -> list[tuple[list[str], int]]:
    """Return table rows and how many linears each stands for.

    Linears that differ only in the layer number share a row: ``model.layers.{0..29}.mlp.down``.
    """
    grouped: dict[tuple[str, ...], list[int | None]] = {}
    for linear in linears:
        name = linear.name
        layer = _LAYER.search(name)
        if layer and not every:
            name = name[: layer.start(1)] + "{}" + name[layer.end(1) :]
        key = (name, *_cells(linear))
        grouped.setdefault(key, []).append(int(layer.group(1)) if layer else None)
    result = []
    for (name, *rest), layers in grouped.items():
        numbers = sorted({layer for layer in layers if layer is not None})
        if "{}" in name:
            name = name.replace("{}", _ranges(numbers))
        result.append(([name, *rest], len(layers)))
    return result


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers as text: 3, {0..29} or {0..3,5}."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}..{b}" for a, b in parts)
    return text if len(numbers) == 1 else "{" + text + "}"
