"""Compile a model once and keep what comes out in the user's cache, for `amx-tvm run`.

A kept artifact's folder is named by the model and the quantization, and by a digest of all that
decides what is compiled: the weights, the target, the quantization and the versions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amx_tvm.artifact.kept import is_artifact, kept_folder
from amx_tvm.artifact.names import default_output
from amx_tvm.compiler.compile import Progress, compile
from amx_tvm.compiler.footprint import footprint
from amx_tvm.config import QuantizationConfig
from amx_tvm.frontends import open_model
from amx_tvm.targets import resolve
from amx_tvm.targets.cuda.driver import gpus_here
from amx_tvm.version import versions

log = logging.getLogger("amx_tvm.compiler")
_DIGITS = 10  # of the digest, in a folder's name


def kept_artifact(
    model: str | os.PathLike[str],
    target: str = "llvm",
    quantization: str = "amxfp4",
    progress: Progress | None = None,
) -> Path:
    """Return the folder of a model's artifact, which is compiled where it is not kept yet.

    Parameters
    ----------
    model, target, quantization, progress
        As for :func:`amx_tvm.compile`; an artifact's own folder is returned as it is.

    Raises
    ------
    AmxError
        As :func:`amx_tvm.compile`.
    """
    if is_artifact(model):
        return Path(model)
    resolved = resolve(target)
    config = QuantizationConfig.parse(quantization)
    config = config.resolve(resolved.device, resolved.features)
    source = open_model(model)
    said: list[Any] = [source.digest(), asdict(resolved.record()), config.describe(), versions()]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:_DIGITS]
    path = kept_folder() / f"{default_output(source.name, config.format).name}-{digest}"
    there = is_artifact(path)
    log.info("%s: %s", path, "taken as it is" if there else "compiled first")
    if not there:
        path.parent.mkdir(parents=True, exist_ok=True)
        estimate = footprint(source, config, resolved)
        if resolved.device == "cuda" and estimate is not None:
            for gpu in gpus_here()[:1]:
                estimate.require_device(gpu.memory, gpu.name)
        compile(source, target, quantization, path, progress=progress)
    return path
