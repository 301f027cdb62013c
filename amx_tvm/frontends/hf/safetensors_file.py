"""The safetensors container: header, bounds checks, one tensor at a time.

Layout (https://huggingface.co/docs/safetensors)::

    8 bytes   length H of the header, little endian
    H bytes   JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}
    the rest  tensor data; offsets count from its first byte

NumPy has no bfloat16: its bits are the upper half of a float32, so a shift widens it exactly.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.frontends.mapped_file import MappedFile

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader

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


class SafetensorsFile:
    """One safetensors file, checked completely when it is opened.

    Parameters
    ----------
    path : path-like
        The file.

    Raises
    ------
    ModelError
        When it is missing, no safetensors file, shorter than its header says, or holds a tensor of
        an unknown type or with offsets that do not fit its shape.
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
        if header_bytes > MAX_HEADER_BYTES:
            raise ModelError(
                f"{self.path} is not a safetensors file: its first 8 bytes announce a header of "
                f"{header_bytes} bytes, at most {MAX_HEADER_BYTES} were expected"
            )
        start = 8 + header_bytes
        if start > size:
            raise ModelError(
                f"{self.path} is truncated: its header ends at byte {start}, the file has {size}; "
                "download or copy it again"
            )
        try:
            header = json.loads(bytes(self.file.buffer[8:start]))
            self.metadata = {k: str(v) for k, v in header.get("__metadata__", {}).items()}
            entries = {
                name: self._entry(name, fields, start)
                for name, fields in header.items()
                if name != "__metadata__"
            }
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ModelError(
                f"{self.path} is not a safetensors file: its header cannot be read ({error!r})"
            ) from None
        needed = max((entry.end for entry in entries.values()), default=start)
        if needed > size:
            raise ModelError(
                f"{self.path} is truncated: its header describes {needed} bytes, the file has "
                f"{size}; download or copy it again"
            )
        return entries

    def _entry(self, name: str, fields: dict, start: int) -> TensorEntry:
        dtype, shape = fields["dtype"], tuple(int(size) for size in fields["shape"])
        begin, end = (int(offset) for offset in fields["data_offsets"])
        # A type that the format got later has no known size; it stops only who needs the tensor.
        expected = math.prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else end - begin
        if begin < 0 or end < begin or min(shape, default=0) < 0 or end - begin != expected:
            raise ModelError(
                f"tensor {name!r} in {self.path} has the bytes {begin}..{end}, but its shape "
                f"{list(shape)} of {dtype} takes {expected}; the file is damaged"
            )
        return TensorEntry(dtype, shape, start + begin, start + end)

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
