"""A Hugging Face directory: config.json, safetensors (one file or shards), the tokenizer."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.frontends.base import ModelSource, sample_digest
from amx_tvm.frontends.hf.config import read_config, read_generation_config, read_json
from amx_tvm.frontends.hf.safetensors_file import SafetensorsFile
from amx_tvm.frontends.hf.tokenizer import has_tokenizer, read_tokenizer
from amx_tvm.frontends.model_tokenizer import ModelTokenizer
from amx_tvm.schema import FileName, Mismatch, conform

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class HuggingFaceSource(ModelSource):
    """A model directory as ``save_pretrained`` writes it.

    Parameters
    ----------
    directory : path-like
        Where config.json is.
    name : str, optional
        Name of the model; by default the directory's.

    Raises
    ------
    ModelError
        For a missing or damaged configuration, a missing or truncated weight file, a tensor that
        the index promises and its shard lacks, or weights of a type that cannot be read.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str | None = None) -> None:
        self.directory = Path(directory)
        self.name = name or self.directory.resolve().name
        self.config = read_config(self.directory)
        self._files = [SafetensorsFile(path) for path in self._weight_files()]
        self._where = {name: file for file in self._files for name in file.tensors}
        self._check_index()
        if "tie_word_embeddings" not in self.config:
            head = any(name.startswith("lm_head.") for name in self._where)
            self.config["tie_word_embeddings"] = not head

    @cached_property
    def generation_config(self) -> dict[str, Any]:  # type: ignore[override]
        """The generation configuration; a large tokenizer.json takes a second to read."""
        given = read_generation_config(self.directory, self.config)
        if not has_tokenizer(self.directory):
            return {**given, "prompt_prefix": []}
        return self._tokenizer.generation_config(given, int(self.config["vocab_size"]))

    @cached_property
    def _tokenizer(self) -> ModelTokenizer:
        return read_tokenizer(self.directory)

    def _weight_files(self) -> list[Path]:
        # As transformers has it, a single file goes first: an index beside it is a leftover.
        if (self.directory / SINGLE_FILE).is_file():
            self._index = {}
            return [self.directory / SINGLE_FILE]
        if (self.directory / INDEX_FILE).is_file():
            weight_map = read_json(self.directory / INDEX_FILE).get("weight_map")
            if not weight_map:
                raise ModelError(f"{self.directory / INDEX_FILE} has no 'weight_map' object")
            try:
                self._index = conform(dict[str, FileName], weight_map, "weight_map")
            except Mismatch as problem:
                raise ModelError(f"{self.directory / INDEX_FILE}: {problem}") from None
            files = sorted(set(self._index.values()))
            for file in files:
                if not (self.directory / file).is_file():
                    raise ModelError(
                        f"{self.directory} lacks the shard {file}, which {INDEX_FILE} names "
                        f"({len(files)} shards in all); download or copy it again"
                    )
            return [self.directory / file for file in files]
        self._index = {}
        files = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if len(files) == 1:
            return [self.directory / files[0]]
        if files:
            raise ModelError(
                f"{self.directory} holds {len(files)} safetensors files without {INDEX_FILE}; "
                "copy the index too"
            )
        pickled = [path.name for kind in ("*.bin", "*.pth") for path in self.directory.glob(kind)]
        hint = (
            f"; {sorted(pickled)[0]} is a pickle, which is not read: load the model with "
            "transformers and save_pretrained() it again"
            if pickled
            else ""
        )
        raise ModelError(
            f"{self.directory} holds no weights: expected {SINGLE_FILE} or {INDEX_FILE} with its "
            f"shards{hint}"
        )

    def _check_index(self) -> None:
        for name, file in self._index.items():
            if name not in self._where:
                raise ModelError(
                    f"tensor {name!r} is not in {self.directory / file}, where {INDEX_FILE} "
                    "promises it; download or copy the shard again"
                )

    def _entry(self, name: str):
        if name not in self._where:
            raise self.missing(name)
        return self._where[name].tensors[name]

    @property
    def metadata(self) -> dict[str, str]:
        """What the headers of the weight files say beside the tensors."""
        return {key: value for file in self._files for key, value in file.metadata.items()}

    def names(self) -> list[str]:
        """Return the names of all tensors, shard by shard."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Return the stored type: "bf16", "f16", "f32" or another safetensors type."""
        return self._entry(name).dtype.lower()

    def check(self, name: str) -> None:
        """Refuse a tensor that is no weight of 16 or more bits."""
        self._entry(name)
        self._where[name].check(name)

    def same(self, first: str, second: str) -> bool:
        """Return whether two tensors hold the same bits; reads no further than they do."""
        one, other = self._entry(first), self._entry(second)
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return self._where[first].same_bytes(first, self._where[second], second)

    def load(self, name: str) -> np.ndarray:
        """Read one tensor as float32."""
        self._entry(name)
        return self._where[name].load(name)

    def load_entry(self, name: str, index: int) -> np.ndarray:
        """Read one entry of a stacked tensor."""
        self._entry(name)
        return self._where[name].load(name, index)

    def stored(self, name: str, index: int | None = None) -> np.ndarray:
        """Return a tensor of codes or scales, or one entry of it, as it is stored: bytes."""
        self._entry(name)
        return self._where[name].stored(name, index)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(e.end - e.begin for file in self._files for e in file.tensors.values())

    def write_tokenizer(self, directory: str | os.PathLike[str]) -> list[str]:
        """Write the tokenizer; see :func:`amx_tvm.frontends.hf.tokenizer.read_tokenizer`."""
        return self._tokenizer.write(Path(directory))

    def digest(self) -> str:
        """Return a cheap identity: the configuration, and samples of every weight file."""
        return sample_digest(
            (self.directory / "config.json").read_bytes(),
            *(file.file.buffer for file in self._files),
        )
