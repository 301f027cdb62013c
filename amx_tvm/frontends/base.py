"""What every frontend gives to the compiler: a configuration and named weights, one at a time.

A :class:`ModelSource` never holds the model in memory: ``load`` reads one tensor, converts it to
float32 and forgets it. Names are those of Hugging Face checkpoints whatever the file says, and a
weight is always ``[out_features, in_features]``.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.formats.base import Quantized


class ModelSource(ABC):
    """A model that compile() can take.

    Attributes
    ----------
    name : str
        Short name for people and manifests.
    kind : str
        "causal_lm", "embedding", or "function" for a module without tokens and KV cache.
    module_names : bool
        Weights have the names and shapes of the compiled module, whatever the family's checkpoints
        call them: the model was compiled before.
    config : dict
        Keys of a Hugging Face ``config.json``.
    generation_config : dict
        "eos_token_id" (a list of all tokens that end a generation), "bos_token_id",
        "prompt_prefix" (a list of the ids that a text begins with) and whatever else the model
        ships.
    """

    name: str
    kind: str = "causal_lm"
    module_names: bool = False
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @property
    def takes_images(self) -> bool:
        """Whether the model has a tower that sees beside its decoder."""
        return isinstance(self.config.get("vision_config"), dict)

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

    def check(self, name: str) -> None:
        """Refuse a tensor that is missing, or of a type that is not read as a weight.

        Called before any work, for the tensors that the model needs.
        """
        self.shape(name)

    def same(self, first: str, second: str) -> bool:
        """Return whether two tensors hold the same numbers in the same type."""
        return (
            self.dtype(first) == self.dtype(second)
            and self.shape(first) == self.shape(second)
            and bool(np.array_equal(self.load(first), self.load(second)))
        )

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
