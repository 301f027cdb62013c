"""Tasks: the distinct kernels of a model on a target, and how often a step runs each.

The model's Relax module is built from its configuration and goes through the compiler's own passes
up to the choice of kernels, so a task is exactly what `compile` will ask records for; no weight is
read. An artifact's manifest lists the same linears and is taken as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import TuningError
from amx_tvm.targets import ResolvedTarget
from relax_passes.activation import Scheme
from relax_passes.chosen import ChosenKernel
from relax_passes.spec import LinearSpec

# Rows of x that CUDA kernels are tuned for: one sequence, small batches, a short prompt.
CUDA_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Task:
    """One kernel to tune.

    Attributes
    ----------
    spec : LinearSpec
        The kernel.
    name : str
        The first linear that runs it.
    decode, prefill : int
        How many times a decode step of one sequence, and a prefill, run it.
    rows : int or None
        The bucket of a CUDA function that this is.
    """

    spec: LinearSpec
    name: str
    decode: int
    prefill: int
    rows: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the task as packages hold it."""
        return {**vars(self), "spec": self.spec.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Task:
        """Read what ``to_json`` wrote; other keys are left alone."""
        own = {f.name: data[f.name] for f in fields(Task)}
        return Task(**{**own, "spec": LinearSpec.from_json(own["spec"])})

    @property
    def text(self) -> str:
        """One line for people."""
        rows = self.spec.rows_up_to(self.rows)
        epilogue = f" +{self.spec.epilogue}" if self.spec.epilogue else ""
        return f"{self.spec.format} {self.spec.n}x{self.spec.k} {rows}{epilogue}"


def tasks_of(
    model: str | os.PathLike[str] | Mapping[str, Any] | Any,
    target: ResolvedTarget,
    quantization: str | QuantizationConfig = "amxfp4",
) -> list[Task]:
    """List the tasks of a model.

    Parameters
    ----------
    model : path, dict or ModelSource
        An artifact directory, a directory with a ``config.json``, that file, the configuration
        itself, or anything ``amx_tvm.frontends.open_model`` takes.
    target : ResolvedTarget
        What the kernels are built for.
    quantization : str or QuantizationConfig
        As for ``amx_tvm.compile``; an artifact keeps its own.

    Raises
    ------
    TuningError
        For an artifact of another target, and when a model has no linear with knobs.
    """
    linears = _manifest_linears(model, target)
    if linears is None:
        linears = _config_linears(_config_of(model), target, quantization)
    found = collect(linears)
    if target.device == "cuda":
        found = by_bucket(found)
    if not found:
        raise TuningError("this model has no linear that a schedule of this target has knobs for")
    return found


def collect(linears: Iterable[Mapping[str, Any]]) -> list[Task]:
    """Count equal kernels in a list of linears as a manifest holds it, most frequent first."""
    counts: dict[LinearSpec, list[Any]] = {}
    for entry in linears:
        linear = ChosenKernel.from_json(entry)
        spec = linear.spec
        if spec.experts or spec.m_max is not None or spec.activation.scheme is Scheme.E4M3:
            continue  # without records, or in a chain: the kernel for any M, with its knobs
        kept = counts.setdefault(spec, [linear.name, 0])
        kept[1] += 1
    tasks = [
        Task(s, name, count if s.m == 1 else 0, count if s.m != 1 else 0)
        for s, (name, count) in counts.items()
    ]
    return sorted(tasks, key=lambda t: (t.spec.m is None, -(t.decode + t.prefill), t.name))


def by_bucket(tasks: Iterable[Task]) -> list[Task]:
    """Split CUDA functions into one task for each of the numbers of rows in ``CUDA_ROWS``.

    The kernel of M = 1 is the same in a decode step's function and in that for any M.
    """
    from tuning.cuda_buckets import general

    found: dict[tuple[LinearSpec, int], Task] = {}
    for task in tasks:
        for rows in CUDA_ROWS:
            if (task.spec.m == 1) != (rows == 1):
                continue
            found[general(task.spec), rows] = replace(task, spec=general(task.spec), rows=rows)
    return sorted(found.values(), key=lambda t: (t.rows or 0, -(t.decode + t.prefill), t.name))


def _manifest_linears(model: Any, target: ResolvedTarget) -> list[dict[str, Any]] | None:
    """Return the linears of an artifact, or None when the model is none."""
    if not isinstance(model, (str, os.PathLike)) or not (Path(model) / "manifest.json").exists():
        return None
    from amx_tvm.artifact import Manifest

    manifest = Manifest.load(Path(model))
    if manifest.target.key != target.key:
        raise TuningError(
            f"{model} was compiled for {manifest.target.key}, and this tunes for {target.key}; "
            "give the model itself, or the target of the artifact"
        )
    return manifest.linears


def _config_of(model: Any) -> Mapping[str, Any]:
    """Return a model's configuration in the keys of Hugging Face."""
    if isinstance(model, Mapping):
        return model
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        path = path / "config.json" if path.is_dir() else path
        if path.suffix == ".json" and path.exists():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise TuningError(f"{path} is no JSON: {error}") from error
    from amx_tvm.frontends import open_model

    source = open_model(model)
    if source.kind != "causal_lm":
        raise TuningError(
            f"{source.name} is a function, not a language model; compile it and tune the artifact"
        )
    return source.config


def _config_linears(
    config: Mapping[str, Any], target: ResolvedTarget, quantization: str | QuantizationConfig
) -> list[dict[str, Any]]:
    """Run the compiler's passes on the model of a configuration up to the choice of kernels."""
    from amx_tvm.cache_storage import cache_storage
    from amx_tvm.models import find
    from relax_passes import pipeline
    from relax_passes.passes import legalize

    policy = QuantizationConfig.parse(quantization).resolve(target.device)
    family = find(dict(config))
    decoder = family.configure(dict(config))
    storage = cache_storage(policy, decoder, target)
    with target.tvm:
        network = family.build(decoder)
        network.to("float32" if target.device == "cpu" else "float16")
        module, _ = network.export_tvm(network.export_spec())
        for name, passes in pipeline.phases(target.tvm, policy, target.layout, None, storage):
            for one in passes:
                module = one(module)
            if name == "legalize":
                break
    return legalize.kernels_of(module)
