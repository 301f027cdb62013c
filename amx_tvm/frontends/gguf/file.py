"""The GGUF container: metadata, tensor table and bounds checks.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little endian::

    "GGUF"  u32 version  u64 tensor count  u64 key count
    keys:    string name, u32 type, value          (array: u32 item type, u64 count, items)
    tensors: string name, u32 rank, u64 dims[rank], u32 type, u64 offset
    padding to ``general.alignment`` (32), then the tensor data; offsets count from there

Dimensions are stored fastest first, the reverse of NumPy's order. The ``gguf`` package has a
reader too; this one parses a 260 000 token vocabulary in well under a second (that one takes 10 to
20) and says where a damaged file ends. The package's block sizes and dequantizers are used.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from amx_tvm.errors import ModelError
from amx_tvm.frontends.mapped_file import MappedFile

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# Metadata takes several times its bytes as Python's values; a vocabulary of 260 000 tokens with its
# merges takes 12 MiB.
MAX_HEADER_BYTES = 96 << 20
MAX_ENTRIES = 1 << 16  # keys, or tensors
MAX_TEXTS = 1 << 22  # of one list
MAX_RANK = 4
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
# GGUF value type -> NumPy type of one scalar; 7 is a bool of one byte.
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table: ggml type, NumPy shape, first byte in the file, byte count."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """One GGUF file, checked completely when it is opened.

    Parameters
    ----------
    path : path-like
        The file.

    Attributes
    ----------
    metadata : dict
        Key to int, float, bool, str, list of str, or NumPy array.
    tensors : dict of str to GgufTensor
        The tensor table under the names of the file.

    Raises
    ------
    ModelError
        When the file is missing, not GGUF, of an unknown version, truncated, or inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = MappedFile(path)
        self.path = self.file.path
        self._position = 0
        magic = bytes(self.file.buffer[:4])
        if magic != b"GGUF":
            raise ModelError(f"{self.path} is not a GGUF file: it begins with {magic!r}")
        self._position = 4
        version = self._integer("<u4")
        if version not in VERSIONS:
            raise ModelError(
                f"{self.path} has GGUF version {version}; versions {VERSIONS[0]} and "
                f"{VERSIONS[1]} in little endian are supported; convert the model again"
            )
        tensor_count, key_count = self._integer("<u8"), self._integer("<u8")
        for what, count in (("keys", key_count), ("tensors", tensor_count)):
            if count > MAX_ENTRIES:
                raise ModelError(
                    f"{self.path} has {count} {what}; at most {MAX_ENTRIES} are read, the file is "
                    "damaged"
                )
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            if key in self.metadata:
                raise ModelError(f"{self.path} holds the key {key!r} twice; it is damaged")
            self.metadata[key] = self._value(self._integer("<u4"))
        self.tensors = self._tensor_table(tensor_count)

    def data(self, tensor: GgufTensor) -> np.ndarray:
        """Return a tensor's stored bytes, uint8 [rows..., bytes of a row], without a copy."""
        block, block_bytes = GGML_QUANT_SIZES[tensor.type]
        row = tensor.shape[-1] // block * block_bytes
        return self.file.view(tensor.offset, tensor.nbytes).reshape(*tensor.shape[:-1], row)

    def release(self, tensor: GgufTensor) -> None:
        """Give the memory of a tensor's pages back."""
        self.file.release(tensor.offset, tensor.nbytes)

    def _take(self, nbytes: int) -> memoryview:
        """Return the next bytes of the header."""
        end = self._position + nbytes
        if end > MAX_HEADER_BYTES:
            raise ModelError(
                f"{self.path} has a header that reads on to byte {end}; at most {MAX_HEADER_BYTES} "
                "are read, the file is damaged"
            )
        if end > self.file.size:
            raise ModelError(
                f"{self.path} is truncated or damaged: its header reads on to byte {end}, the file "
                f"has {self.file.size}; download or copy it again"
            )
        taken = self.file.buffer[self._position : end]
        self._position = end
        return taken

    def _integer(self, dtype: str) -> int:
        return int(np.frombuffer(self._take(np.dtype(dtype).itemsize), dtype)[0])

    def _string(self) -> str:
        # Bytes that are no UTF-8 occur in names; they must not stop the file.
        return str(self._take(_U64.unpack(self._take(8))[0]), "utf-8", "replace")

    def _strings(self, count: int) -> list[str]:
        """Read ``count`` strings; the loop runs some 10^6 times for a large vocabulary."""
        buffer, position, size, unpack = (
            self.file.buffer,
            self._position,
            min(self.file.size, MAX_HEADER_BYTES),
            _U64.unpack_from,
        )
        if count > MAX_TEXTS:
            raise ModelError(
                f"{self.path} has a list of {count} strings; at most {MAX_TEXTS} are read, the "
                "file is damaged"
            )
        strings = []
        for _ in range(count):
            if position + 8 > size:
                break
            start = position + 8
            position = start + unpack(buffer, position)[0]
            if position > size:
                break
            # Lone surrogates keep what is no UTF-8 apart; see the vocabulary.
            strings.append(str(buffer[start:position], "utf-8", "surrogateescape"))
        if len(strings) < count:
            raise ModelError(
                f"{self.path} is truncated or damaged: a list of {count} strings breaks off after "
                f"{len(strings)}; download or copy it again"
            )
        self._position = position
        return strings

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            value = np.frombuffer(self._take(dtype.itemsize), dtype)[0]
            # The shortest text of a float32 is what the converter was given: 1e-05, 10000.0.
            return float(str(value)) if kind == _FLOAT32 else value.item()
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._integer("<u4"), self._integer("<u8")
            if item == _STRING:
                return self._strings(count)
            if item in _SCALARS:
                dtype = np.dtype(_SCALARS[item])
                return np.frombuffer(self._take(count * dtype.itemsize), dtype)
            kind = item
        raise ModelError(
            f"{self.path} has a key of type {kind} near byte {self._position}, which GGUF does not "
            "define; the file is damaged or newer than this reader"
        )

    def _tensor_table(self, count: int) -> dict[str, GgufTensor]:
        rows = []
        for _ in range(count):
            name = self._string()
            rank = self._integer("<u4")
            if rank > MAX_RANK:
                raise ModelError(f"tensor {name!r} in {self.path} has rank {rank}; at most 4 fits")
            dims = [self._integer("<u8") for _ in range(rank)]
            rows.append((name, tuple(reversed(dims)), self._integer("<u4"), self._integer("<u8")))
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ModelError(
                f"{self.path} has the alignment {alignment}; a power of 2 was expected"
            )
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in rows:
            if name in tensors:
                raise ModelError(f"{self.path} holds the tensor {name!r} twice; it is damaged")
            tensors[name] = self._tensor(name, shape, kind, start + offset)
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        try:
            type_ = GGMLQuantizationType(kind)
        except ValueError:
            raise ModelError(
                f"tensor {name!r} in {self.path} has the unknown type {kind}; "
                "a newer 'gguf' package may know it"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[type_]
        if not shape or 0 in shape or shape[-1] % block:
            raise ModelError(
                f"tensor {name!r} in {self.path} has the shape {list(shape)}, whose rows are not "
                f"one or more whole blocks of {block} of {type_.name}; the file is damaged"
            )
        nbytes = math.prod(shape) // block * block_bytes
        if offset + nbytes > self.file.size:
            raise ModelError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {offset + nbytes}, the "
                f"file has {self.file.size}; download or copy it again"
            )
        return GgufTensor(type_, shape, offset, nbytes)
