"""compile(): model in, artifact directory out.

open the model -> Relax module of its family -> passes -> library
               -> recipes -> packed parameters, streamed into shards
               -> manifest, tokenizer, atomic rename
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amx_tvm.artifact import ArtifactWriter, Manifest, Versions, signature
from amx_tvm.artifact.manifest import LibraryRecord
from amx_tvm.artifact.names import default_output
from amx_tvm.compiler.adapters import Adapters
from amx_tvm.compiler.exclusive import one_at_a_time
from amx_tvm.compiler.footprint import footprint
from amx_tvm.compiler.lowered import LoweredModel, check_cache, lower_source
from amx_tvm.compiler.objects import export
from amx_tvm.compiler.weights import (
    NO_OVERRIDES,
    Materializer,
    Overrides,
    bits_by_format,
    parameters,
)
from amx_tvm.config import QuantizationConfig
from amx_tvm.documents import read_documents
from amx_tvm.errors import CalibrationError, ModelError, TargetError
from amx_tvm.extras import require
from amx_tvm.frontends import ModelSource, open_model
from amx_tvm.frontends.base import sample_digest
from amx_tvm.frontends.hf.embedding import EmbeddingSource
from amx_tvm.frontends.importers.torch_module import is_torch_module
from amx_tvm.frontends.lora import MergedLora
from amx_tvm.linker import collector, linker
from amx_tvm.targets import ResolvedTarget, resolve
from amx_tvm.targets.cuda.toolchain import require_compiler
from amx_tvm.version import versions
from relax_passes import pipeline
from relax_passes.passes.bundle_parameters import bytes_of, dtypes_of
from relax_passes.recipes import recipe_of, to_json
from tuning.lookup import records_for

log = logging.getLogger("amx_tvm.compiler")
Progress = Callable[[str, int, int, str], None]
OBJECTS = "objects"  # folder of object files that are not linked yet


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk: its directory and manifest."""

    path: str
    manifest: Manifest

    def __repr__(self) -> str:
        made = self.manifest.quantization.get("format", "none")
        return f"<Artifact {self.path}: {made} for {self.manifest.target.key}>"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized and plain weights per weight, scales included."""
        return float(self.manifest.quantization["bits_per_weight"])


@one_at_a_time
def compile(  # noqa: A001 - the verb that users know
    model: str | os.PathLike[str] | ModelSource | Any,
    target: str = "llvm",
    quantization: str | QuantizationConfig = "amxfp4",
    output: str | os.PathLike[str] | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    attention: bool = False,
    kv_cache: str | None = None,
    calibration: str | os.PathLike[str] | Sequence[Sequence[Any]] | None = None,
    recipe: Any = None,
    adapter: str | os.PathLike[str] | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    overwrite: bool = False,
    overrides: Overrides = NO_OVERRIDES,
    records: Any = None,
    dump_ir: str | os.PathLike[str] | None = None,
    link: bool = True,
    sign: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model to an artifact; calls from several threads take turns.

    Parameters
    ----------
    model : path, hub id, torch.nn.Module or ModelSource
        What ``amx_tvm.frontends.open_model`` takes: a Hugging Face directory, a GGUF, ONNX or
        StableHLO file, a hub id, a torch module, or an opened source.
    target : str
        "llvm" (this CPU), "cuda" (this GPU), "llvm:CPU", "cuda:sm_90a" or a row of
        ``amx_tvm.targets``.
    quantization : str or QuantizationConfig
        "amxfp4" (weights), "amxfp4-w4a4" (weights and activations), another format, or "none".
    output : path, optional
        Directory of the artifact; by default ``dist/NAME-QUANTIZATION`` here, NAME being what
        of the model's name is letters, digits and "._+-".
    example_inputs : sequence of tensor, optional
        Inputs that a torch module is exported with; not needed for causal language models.
    dynamic_shapes : optional
        Which of their dimensions stay free, as ``torch.export.export`` takes it.
    strict : bool
        Compute with unrounded float32 activations.
    attention : bool
        Round both inputs of QK^T and of PV to the format as well, as the paper does; needs
        activations "w4a4".
    kv_cache : str, optional
        What keys and values are kept as: "float32", "float16", or a format of few bits
        ("int8", "amxfp4", "amxfp4-e4m3", "nvfp4"); by default what is fastest without a loss.
    calibration : path, or inputs of a torch module, optional
        Text, other than what the result is tested on, by which the weights are rounded; for a
        torch module that is no language model, a list of calls' positional inputs. Needs torch,
        and for a model of embeddings, whose texts are the lines, transformers.
    recipe : str or Recipe, optional
        How: a name of ``amx_tvm.calibration.RECIPES``, by default "best", "gptq" for modules.
    adapter : path, optional
        Directory of a LoRA adapter in PEFT's layout, merged into the weights before they are
        rounded.
    adapters : mapping of str to path, optional
        Directories of LoRA adapters that stay apart from the weights, by the names by which
        ``engine.generate(adapter=...)`` and a server's requests (``model``) choose one.
    overwrite : bool
        Replace an existing artifact at ``output``.
    overrides : Overrides
        Weights from a calibration that was made before, which replace the model's own.
    records : path, callable or False, optional
        Tuning records: a file, a directory of files, or LinearSpec -> knobs or None; by default
        those that ship for exactly this target, False takes none.
    dump_ir : path, optional
        Write the module after each phase into this directory.
    link : bool
        False keeps the object files in the folder ``objects`` instead of a library, for targets
        whose linker is not here; `amx_tvm.export` adds what links them elsewhere.
    sign : path, optional
        A private key (Ed25519, PEM) by which the artifact is signed.
    progress : callable, optional
        Called with (stage, done, total, detail); stages are "fit", whose detail says what the model
        takes, "lower", "weights", "build".

    Returns
    -------
    Artifact

    Raises
    ------
    AmxError
        For anything wrong with the model, target, format or output; nothing is left behind.
    """
    key = signature.private_key(sign, link)
    config = QuantizationConfig.parse(quantization, strict)
    if attention:
        config = QuantizationConfig.parse(replace(config, attention=True))
    if kv_cache is not None:
        config = QuantizationConfig.parse(replace(config, kv_cache=kv_cache))
    if recipe is not None and calibration is None:
        raise CalibrationError(
            f"recipe {recipe!r} was given without a text; name a file with --calibration"
        )
    if calibration is not None:
        require("torch", "torch", "calibration", CalibrationError)
    resolved = resolve(target)
    config = config.resolve(resolved.device, resolved.features)
    linking = linker(resolved.triple) if link else None
    source = open_model(model, example_inputs, dynamic_shapes)
    if adapter is not None:
        source = MergedLora(source, adapter)
    apart = None if adapters is None else kept_apart(source, adapters, resolved, calibration)
    check_cache(source, config, resolved)
    tell = _told(progress)
    log.info("%s for %s, %s", source.name, resolved.key, config.describe())
    label = config.format + ("-strict" if strict else "")
    place = Path(output) if output is not None else default_output(source.name, label)
    with ArtifactWriter(place, overwrite=overwrite, key=key) as writer:
        # What cannot work is found here, before anything is calibrated or quantized.
        estimate = footprint(source, config, resolved)
        if estimate is not None:
            estimate.require(place)
        if resolved.device == "cuda":
            require_compiler()
        if linking is not None:
            linking.check(writer.directory)
        if source.kind != "function":
            source.write_tokenizer(writer.directory)
        if estimate is not None:
            tell("fit", 1, 1, str(estimate))
        if calibration is not None:
            if isinstance(source, EmbeddingSource):
                made = calibrated_embedding(source, config, calibration, recipe)
            elif source.kind == "function":
                made = calibrated_module(model, config, calibration, recipe)
            else:
                folder = writer.publication.workspace / "calibration"
                made = calibrated(source, config, calibration, recipe or "best", tell, folder)
            config, overrides = made.config, made
        tell("lower", 0, 1, source.name)
        chosen = records_for(records, resolved)
        lowered = lower_source(
            source, resolved, config, records=chosen, dump_ir=dump_ir, adapters=apart
        )
        tell("lower", 1, 1, "")
        write_parameters(lowered, writer, overrides, tell)
        tell("build", 0, 1, str(resolved.key))
        write_library(lowered, resolved, writer.path("lib.so" if link else OBJECTS), link)
        tell("build", 1, 1, "")
        library = writer.library("lib.so") if link else LibraryRecord("lib.so", 0, "")
        manifest = manifest_of(source, lowered, resolved, config, writer, library)
        if hasattr(overrides, "describe"):
            text = os.fspath(calibration) if isinstance(calibration, str | os.PathLike) else ""
            manifest.quantization["recipe"] = {**overrides.describe(), "text": text}
        manifest = writer.finish(manifest)
    return Artifact(str(place), manifest)


def kept_apart(
    source: ModelSource, given: Mapping[str, Any], target: ResolvedTarget, calibration: Any
) -> Adapters:
    """Open the adapters that stay apart from a model's weights.

    Raises
    ------
    ModelError, TargetError, CalibrationError
        For an adapter that does not fit, a target without kernels for them, or weights that a
        recipe is to change: adapters were trained beside those of the checkpoint.
    """
    if target.device != "cpu":
        raise TargetError(
            f"adapters stay apart on CPUs only, and the target is {target.key}; merge one "
            "(adapter=, --adapter)"
        )
    if source.kind == "causal_lm" and calibration is None:
        return Adapters(source, given)
    if calibration is not None:
        raise CalibrationError(
            "adapters stay apart from weights that are rounded as they are; leave out the "
            "calibration, or merge one adapter (adapter=, --adapter)"
        )
    raise ModelError(f"{source.name} is no language model, whose linears alone take adapters")


def _told(progress: Progress | None) -> Progress:
    """Return a callback that calls another one and logs when stages end."""
    began: dict[str, float] = {}

    def tell(stage: str, done: int, total: int, detail: str = "") -> None:
        start = began.setdefault(stage, time.perf_counter())
        log.debug("%s: %d of %d %s", stage, done, total, detail)
        if stage == "fit":
            log.info("%s", detail)
        elif done == total:
            log.info("%s: %.1f s", stage, time.perf_counter() - start)
        if progress is not None:
            progress(stage, done, total, detail)

    return tell


def calibrated(
    source: ModelSource,
    config: QuantizationConfig,
    text: Any,
    recipe: Any,
    progress: Progress,
    folder: Path,
) -> Any:
    """Round a model's weights by a recipe on the text of a file or directory, into a folder.

    Raises
    ------
    CalibrationError
        When the recipe, model or text does not fit, or a training diverges and has gained nothing;
        what one had gained before it diverged is used, with a warning.
    """
    if not isinstance(text, str | os.PathLike):
        raise CalibrationError(
            f"calibration is a {type(text).__name__}; for a language model it is a file of text"
        )
    from amx_tvm.calibration import TrainingDiverged, calibrate

    documents = read_documents(text)
    try:
        return calibrate(source, config, documents, recipe, directory=folder, progress=progress)
    except TrainingDiverged as error:
        if not error.gained:
            raise
        log.warning("%s", error)
        return error.calibration


def calibrated_embedding(
    source: EmbeddingSource, config: QuantizationConfig, text: Any, recipe: Any
) -> Any:
    """Round a model of embeddings by a recipe on the lines of a file or directory.

    Raises
    ------
    CalibrationError
        When the recipe or text does not fit.
    """
    if not isinstance(text, str | os.PathLike):
        raise CalibrationError(
            f"calibration is a {type(text).__name__}; for a model of embeddings it is a file of "
            "text, whose lines are texts"
        )
    from amx_tvm.calibration.embedding import calibrate_embedding

    return calibrate_embedding(source, read_documents(text), config, recipe)


def calibrated_module(model: Any, config: QuantizationConfig, batches: Any, recipe: Any) -> Any:
    """Round a torch module's linears by a recipe on example inputs.

    Raises
    ------
    CalibrationError
        When the model is no torch module, or batches or recipe do not fit.
    """
    if not is_torch_module(model) or isinstance(batches, str | os.PathLike):
        raise CalibrationError(
            "calibration of a function takes a torch module and a list of calls' inputs, given "
            f"were a {type(model).__name__} and a {type(batches).__name__}"
        )
    from amx_tvm.calibration import calibrate_module

    return calibrate_module(model, batches, config, recipe)


def write_library(
    lowered: LoweredModel, target: ResolvedTarget, path: Path, link: bool = True
) -> None:
    """Compile the lowered module to machine code: a shared library, or a folder of objects."""
    executable = pipeline.build(lowered.module, target.tvm)
    export(executable, path, linker(target.triple) if link else collector(path))


def write_parameters(
    lowered: LoweredModel,
    writer: ArtifactWriter,
    overrides: Overrides = NO_OVERRIDES,
    progress: Progress = lambda *_: None,
) -> None:
    """Carry out the parameter plan of a lowered model, one weight at a time, into the shards."""
    writer.publication.require(bytes_of(lowered.module))
    dtypes = dtypes_of(lowered.module)
    materializer = Materializer(lowered.source, overrides, lowered.adapters, lowered.balance)
    for name, array in parameters(
        lowered.order, lowered.plan, materializer, lambda d, t, n: progress("weights", d, t, n)
    ):
        writer.parameters.add(name, array.astype(dtypes[name], copy=False))


def manifest_of(
    source: ModelSource,
    lowered: LoweredModel,
    target: ResolvedTarget,
    config: QuantizationConfig,
    writer: ArtifactWriter,
    library: LibraryRecord,
) -> Manifest:
    """Describe an artifact whose parameters have been written."""
    kept = writer.parameters.finish(lowered.order)
    weights, digest = lowered.weight_count, source.digest()
    plan = {name: recipe_of(lowered.plan, name) for name in lowered.order}
    own = sum(r.bytes for name, r in kept.tensors.items() if not plan[name].adapter)
    if lowered.adapters is not None:
        digest = sample_digest(digest.encode(), lowered.adapters.digest().encode())
    return Manifest(
        versions=Versions(**versions()),
        target=target.record(),
        library=library,
        parameters=kept,
        model={**lowered.model, "source_digest": digest},
        quantization={
            **config.describe(),
            "weights": weights,
            "bits_per_weight": 8 * own / weights,
            "bits_by_format": bits_by_format(lowered.plan, lowered.source.shape, kept.tensors),
        },
        kv_cache=lowered.kv_cache,
        linears=lowered.linears,
        functions=lowered.functions,
        recipes=to_json(plan),
        kind=source.kind,
    )
