"""The safetensors container: header, bounds checks, one tensor at a time.

Layout (https://huggingface.co/docs/safetensors)::

    8 bytes   length H of the header, little endian
    H bytes   JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}
    the rest  tensor data; offsets count from its first byte

NumPy has no bfloat16: its bits are the upper half of a float32, so a shift widens it exactly.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.frontends.mapped_file import MappedFile
from amx_tvm.schema import Mismatch, Size, conform
from amx_tvm.strict_json import MAX_BYTES, parse_json

# Bytes of one element of each type that the format defines.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

LOADABLE = ("BF16", "F16", "F32", "F64")
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: stored type ("BF16"), shape, its bytes [begin, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Described(TypedDict):
    """A tensor in the header."""

    dtype: str
    shape: list[Size]
    data_offsets: list[Size]


class SafetensorsFile:
    """One safetensors file, checked completely when it is opened, as the reference reader does.

    The tensors' bytes follow one another: nothing overlaps, and no byte of the file is left over.

    Parameters
    ----------
    path : path-like
        The file.

    Raises
    ------
    ModelError
        When it is missing, no safetensors file, shorter or longer than its header says, names a
        tensor twice, or holds one with offsets that do not fit its shape or its neighbours.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = MappedFile(path)
        self.path = self.file.path
        self.metadata: dict[str, str] = {}
        self.tensors = self._read_header()

    def _read_header(self) -> dict[str, TensorEntry]:
        size = self.file.size
        if size < 8:
            raise ModelError(f"{self.path} is truncated: {size} bytes, no safetensors header")
        header_bytes = int.from_bytes(self.file.buffer[:8], "little")
        if header_bytes > MAX_BYTES:
            raise ModelError(
                f"{self.path} is not a safetensors file: its first 8 bytes announce a header of "
                f"{header_bytes} bytes, at most {MAX_BYTES} were expected"
            )
        start = 8 + header_bytes
        if start > size:
            raise ModelError(
                f"{self.path} is truncated: its header ends at byte {start}, the file has {size}; "
                "download or copy it again"
            )
        what = f"{self.path} is not a safetensors file: its header"
        header = parse_json(self.file.buffer[8:start].tobytes(), what, ModelError, unique=True)
        try:
            header = conform(dict[str, Any], header, "header")
            self.metadata = conform(dict[str, str], header.pop("__metadata__", {}), "__metadata__")
            described = conform(dict[str, _Described], header)
        except Mismatch as problem:
            raise ModelError(f"{what} cannot be read: {problem}") from None
        entries = {name: self._entry(name, fields, start) for name, fields in described.items()}
        self._check_places(entries, start)
        return entries

    def _entry(self, name: str, fields: _Described, start: int) -> TensorEntry:
        dtype, shape = fields["dtype"], tuple(fields["shape"])
        if len(fields["data_offsets"]) != 2:
            raise ModelError(
                f"tensor {name!r} in {self.path} has {len(fields['data_offsets'])} data_offsets; "
                "expected two, its first byte and the one past its last; the file is damaged"
            )
        begin, end = fields["data_offsets"]
        # A type that the format got later has no known size; it stops only who needs the tensor.
        expected = math.prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else end - begin
        if end < begin or end - begin != expected:
            raise ModelError(
                f"tensor {name!r} in {self.path} has the bytes {begin}..{end}, but its shape "
                f"{list(shape)} of {dtype} takes {expected}; the file is damaged"
            )
        return TensorEntry(dtype, shape, start + begin, start + end)

    def _check_places(self, entries: dict[str, TensorEntry], start: int) -> None:
        """Refuse tensors that overlap or leave a hole, and bytes that no tensor has."""
        size, at = self.file.size, start
        needed = max((entry.end for entry in entries.values()), default=start)
        if needed > size:
            raise ModelError(
                f"{self.path} is truncated: its header describes {needed} bytes, the file has "
                f"{size}; download or copy it again"
            )
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != at:
                how = "overlaps the tensor before it" if entry.begin < at else "leaves a hole"
                raise ModelError(
                    f"tensor {name!r} in {self.path} begins at byte {entry.begin} and {how}: byte "
                    f"{at} was expected; the file is damaged"
                )
            at = entry.end
        if at != size:
            raise ModelError(
                f"{self.path} has {size - at} bytes behind its last tensor, which no tensor has; "
                "the file is damaged"
            )

    def check(self, name: str) -> None:
        """Refuse a tensor that cannot be loaded as a weight.

        Raises
        ------
        ModelError
            Naming the tensor and its type.
        """
        dtype = self.tensors[name].dtype
        if dtype not in LOADABLE:
            raise ModelError(
                f"tensor {name!r} in {self.path} is stored as {dtype}; weights were expected in "
                f"one of {', '.join(LOADABLE)} (use the unquantized checkpoint)"
            )

    def same_bytes(self, name: str, other: SafetensorsFile, second: str) -> bool:
        """Return whether a tensor of this file and one of another have the same bytes."""
        one, two = self.tensors[name], other.tensors[second]
        size = one.end - one.begin
        if size != two.end - two.begin:
            return False
        for start in range(0, size, CHUNK_BYTES):
            length = min(CHUNK_BYTES, size - start)
            places = (self.file, one.begin + start), (other.file, two.begin + start)
            left, right = (file.view(begin, length) for file, begin in places)
            equal = np.array_equal(left, right)
            for file, begin in places:
                file.release(begin, length)
            if not equal:
                return False
        return True

    def load(self, name: str, index: int | None = None) -> np.ndarray:
        """Return a tensor of floats, or one entry of it along axis 0, as a new float32 array.

        Raises
        ------
        ModelError
            For a tensor of another type.
        """
        self.check(name)
        entry = self.tensors[name]
        begin, size, shape = self._part(entry, index)
        stored = self.file.view(begin, size)
        if entry.dtype == "BF16":
            values = stored.view("<u2").astype(np.uint32)
            values <<= 16
            values = values.view(np.float32)
        else:
            values = stored.view(f"<f{ITEM_BYTES[entry.dtype]}").astype(np.float32)
        self.file.release(begin, size)
        return values.reshape(shape)

    @staticmethod
    def _part(entry: TensorEntry, index: int | None) -> tuple[int, int, tuple[int, ...]]:
        """Return first byte, bytes and shape of a tensor or of one entry of it."""
        size = entry.end - entry.begin
        if index is None:
            return entry.begin, size, entry.shape
        size //= entry.shape[0]
        return entry.begin + index * size, size, entry.shape[1:]

    def stored(self, name: str, index: int | None = None) -> np.ndarray:
        """Return a copy of a tensor's bytes, uint8, with the last axis counted in bytes."""
        entry = self.tensors[name]
        begin, size, shape = self._part(entry, index)
        stored = np.array(self.file.view(begin, size).view(np.uint8))
        *lead, last = shape or (1,)
        return stored.reshape(*lead, last * ITEM_BYTES[entry.dtype])
