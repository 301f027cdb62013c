"""A GGUF model (one file, or the parts that gguf-split makes) under Hugging Face's names."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.formats.base import Quantized
from amx_tvm.frontends.base import ModelSource, sample_digest
from amx_tvm.frontends.gguf.config import find_architecture, read_config
from amx_tvm.frontends.gguf.file import GgufFile, GgufTensor
from amx_tvm.frontends.gguf.parts import open_parts
from amx_tvm.frontends.gguf.rope import FACTOR_TENSORS
from amx_tvm.frontends.gguf.tokenizer import write_gguf_tokenizer
from amx_tvm.frontends.gguf.types import SUPPORTED, dequantize, quantized_blocks
from amx_tvm.frontends.gguf.vocabulary import Vocabulary

# Tensors that old converters wrote and nobody reads.
UNUSED = (".attn_rot_embd.weight",)


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, and how many heads its rows are interleaved by (0: not at all).

    ``scale`` is the factor on the whole of an NVFP4 weight, which is a tensor of its own.
    """

    file: GgufFile
    tensor: GgufTensor
    interleaved_heads: int = 0
    offset: float = 0.0
    scale: np.float32 | None = None


class GgufSource(ModelSource):
    """A GGUF file.

    Parameters
    ----------
    path : path-like
        The file; of a split model, any of its parts.

    Raises
    ------
    ModelError
        For a missing or truncated file, a missing part, an unknown architecture, a missing key, or
        a tensor whose name or type is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files = open_parts(self.path)
        self.metadata = self._files[0].metadata
        name, architecture = find_architecture(self.metadata, self.path)
        self.name = str(self.metadata.get("general.name") or self.path.stem)
        self._tensors: dict[str, _Stored] = {}
        rope_factors: dict[str, np.ndarray] = {}
        for file in self._files:
            for stored_name, tensor in file.tensors.items():
                if stored_name in FACTOR_TENSORS:
                    _check_type(stored_name, file, tensor)
                    values = dequantize(file.data(tensor), tensor.type, tensor.shape)
                    rope_factors[stored_name.removesuffix(".weight")] = values
                    continue
                if stored_name.endswith(UNUSED):
                    continue
                hf_name = architecture.tensor_name(stored_name)
                if hf_name is None:
                    raise ModelError(
                        f"tensor {stored_name!r} in {file.path} is none of a {name} model as this "
                        "project knows it (vision parts are not read)"
                    )
                norm = hf_name.endswith("norm.weight")
                offset = architecture.norm_offset if norm else 0.0
                self._tensors[hf_name] = _Stored(file, tensor, 0, offset)
        self._attach_scales()
        shapes = {key: stored.tensor.shape for key, stored in self._tensors.items()}
        self.config = read_config(
            name, architecture, self.metadata, shapes, rope_factors, self.path
        )
        if architecture.interleaved_rope:
            self._mark_interleaved()
        self.generation_config = {"bos_token_id": None, "eos_token_id": [], "prompt_prefix": []}
        if "tokenizer.ggml.tokens" in self.metadata:
            self.generation_config = Vocabulary.read(self.metadata, self.path).generation_config()

    def _attach_scales(self) -> None:
        """Move the tensors ``X.scale`` and ``X.input_scale`` of NVFP4 weights to their weights."""
        for name in [n for n in self._tensors if n.endswith((".scale", ".input_scale"))]:
            entry = self._tensors.pop(name)
            weight = f"{name.rpartition('.')[0]}.weight"
            if name.endswith(".input_scale") or weight not in self._tensors:
                continue
            data = entry.file.data(entry.tensor)
            values = dequantize(data, entry.tensor.type, entry.tensor.shape)
            if values.size != 1:
                raise ModelError(
                    f"tensor {name!r} in {self.path} has {values.size} values; one scale was "
                    "expected"
                )
            scale = np.float32(values.reshape(()))
            self._tensors[weight] = replace(self._tensors[weight], scale=scale)

    def _mark_interleaved(self) -> None:
        counts = {
            "q_proj": int(self.config["num_attention_heads"]),
            "k_proj": int(self.config["num_key_value_heads"]),
        }
        for name, stored in self._tensors.items():
            heads = counts.get(name.split(".")[-2], 0)
            if heads and stored.tensor.shape[0] % (2 * heads):
                raise ModelError(
                    f"tensor {name!r} in {self.path} has {stored.tensor.shape[0]} rows, which do "
                    f"not divide into {heads} heads of an even size"
                )
            self._tensors[name] = replace(stored, interleaved_heads=heads)

    def _stored(self, name: str) -> _Stored:
        if name not in self._tensors:
            raise self.missing(name)
        return self._tensors[name]

    def names(self) -> list[str]:
        """Return the Hugging Face names of all tensors in file order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._stored(name).tensor.shape

    def dtype(self, name: str) -> str:
        """Return the ggml type in lower case, such as "q4_1"."""
        return self._stored(name).tensor.type.name.lower()

    def check(self, name: str) -> None:
        """Refuse a tensor of a type that is not decoded."""
        stored = self._stored(name)
        _check_type(name, stored.file, stored.tensor)

    def load(self, name: str) -> np.ndarray:
        """Read and dequantize one tensor, undoing what the converter changed."""
        return self._load(name, None)

    def load_entry(self, name: str, index: int) -> np.ndarray:
        """Read one entry of a stacked tensor."""
        return self._load(name, index)

    @staticmethod
    def _bytes(stored: _Stored, index: int | None) -> tuple[np.ndarray, tuple[int, ...]]:
        """Return the stored bytes and the shape of a tensor or of one entry of it."""
        data, shape = stored.file.data(stored.tensor), stored.tensor.shape
        return (data, shape) if index is None else (data[index], shape[1:])

    def _load(self, name: str, index: int | None) -> np.ndarray:
        stored = self._stored(name)
        _check_type(name, stored.file, stored.tensor)
        data, shape = self._bytes(stored, index)
        values = dequantize(data, stored.tensor.type, shape)
        stored.file.release(stored.tensor)
        if stored.scale is not None:
            values *= stored.scale
        if stored.offset:
            values -= np.float32(stored.offset)
        return deinterleave(values, stored.interleaved_heads)

    def load_raw(self, name: str) -> Quantized | None:
        """Return the stored codes and scales of MXFP4, NVFP4 and Q8_0, rows in HF order."""
        return self._raw(name, None)

    def load_raw_entry(self, name: str, index: int) -> Quantized | None:
        """Return one entry of :meth:`load_raw`."""
        return self._raw(name, index)

    def _raw(self, name: str, index: int | None) -> Quantized | None:
        stored = self._stored(name)
        if stored.offset:
            return None
        data, shape = self._bytes(stored, index)
        raw = quantized_blocks(data, stored.tensor.type, shape)
        stored.file.release(stored.tensor)
        if raw is None:
            return None
        for key, scale in raw.scales.items():
            if not np.isfinite(raw.format.decode_scale(key, scale)).all():
                raise ModelError(f"tensor {name!r} in {self.path} holds NaN or Inf; it is damaged")
        heads = stored.interleaved_heads
        scales = {key: deinterleave(value, heads) for key, value in raw.scales.items()}
        tensor_scale = raw.tensor_scale
        if tensor_scale is not None and stored.scale is not None:
            tensor_scale = np.asarray(tensor_scale * stored.scale, np.float32)
        return Quantized(deinterleave(raw.codes, heads), scales, raw.format, tensor_scale)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(stored.tensor.nbytes for stored in self._tensors.values())

    def write_tokenizer(self, directory: str | os.PathLike[str]) -> list[str]:
        """Build the tokenizer from the file's vocabulary."""
        return write_gguf_tokenizer(
            self.metadata, Path(directory), int(self.config["max_position_embeddings"]), self.path
        )

    def digest(self) -> str:
        """Return a cheap identity: samples of every part."""
        return sample_digest(*(file.file.buffer for file in self._files))


def _check_type(name: str, file: GgufFile, tensor: GgufTensor) -> None:
    if tensor.type not in SUPPORTED:
        raise ModelError(
            f"tensor {name!r} in {file.path} is stored as {tensor.type.name}; supported are "
            + ", ".join(sorted(kind.name for kind in SUPPORTED))
        )


def deinterleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Bring rows of q or k from ggml's pair order to Hugging Face's half order.

    Within a head of D rows, ggml's order is 0, D/2, 1, D/2 + 1, ...: the two rows that RoPE
    rotates together lie side by side. ``heads`` 0 means that nothing is to be done.
    """
    if not heads:
        return array
    rows = array.shape[0]
    pairs = array.reshape(heads, rows // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
