"""Raw parameter shards: written as a stream, read as memory maps.

A shard is a concatenation of little-endian, C-contiguous tensors, each starting at a multiple of
64 bytes (a cache line, and the alignment that TVM's generated vector loads assume)::

    | tensor a | 0..63 zero bytes | tensor b | ... | shard ends near SHARD_BYTES |

The writer holds one tensor at a time and computes both digests on the way out. The reader maps a
shard privately (copy on write): the pages are the page cache's until somebody writes, and NumPy
exports only writable arrays through DLPack without a copy. Or it reads the shard into huge pages.
"""

from __future__ import annotations

import hashlib
import mmap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from amx_tvm.artifact.manifest import Parameters, ShardRecord, TensorRecord
from amx_tvm.artifact.memory import read_to_huge_pages
from amx_tvm.errors import ArtifactError

ALIGNMENT = 64
SHARD_BYTES = 256 << 20
BLOCK_BYTES = 8 << 20
FOLDER = "params"


class ParameterWriter:
    """Append tensors to shards under ``directory/params``.

    Parameters
    ----------
    directory : Path
        The (temporary) artifact directory.
    shard_bytes : int
        A new shard starts when a tensor would push the current one over this size; one tensor is
        never split.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES):
        self._directory = Path(directory)
        (self._directory / FOLDER).mkdir(parents=True, exist_ok=True)
        self._shard_bytes = shard_bytes
        self._tensors: dict[str, TensorRecord] = {}
        self._shards: list[ShardRecord] = []
        self._file: BinaryIO | None = None

    def add(self, name: str, array: np.ndarray) -> TensorRecord:
        """Append one tensor and return where it went.

        Raises
        ------
        ArtifactError
            ``name`` was added before, or the dtype has no raw little-endian form.
        OSError
            The disk is full or fails.
        """
        if name in self._tensors:
            raise ArtifactError(f"parameter {name!r} was added twice")
        if array.dtype.kind not in "biuf":
            raise ArtifactError(
                f"parameter {name!r} has dtype {array.dtype}, expected a number type"
            )
        shape = list(array.shape)
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        if self._file is not None and self._offset + array.nbytes > self._shard_bytes:
            self._close_shard()
        if self._file is None:
            self._open_shard()
        self._write(memoryview(bytes(-self._offset % ALIGNMENT)))
        record = TensorRecord(
            shape, array.dtype.name, len(self._shards), self._offset, array.nbytes
        )
        if array.nbytes:
            self._write(array.reshape(-1).data.cast("B"))
        self._tensors[name] = record
        return record

    def finish(self, order: Sequence[str] | None = None) -> Parameters:
        """Close the last shard and return the record of everything.

        Parameters
        ----------
        order : sequence of str, optional
            The order of the library's parameter tuple; the order of the `add` calls if left out.
        """
        if self._file is not None:
            self._close_shard()
        names = list(order) if order is not None else list(self._tensors)
        missing = [name for name in names if name not in self._tensors]
        if missing:
            raise ArtifactError(f"parameters were never written: {', '.join(missing[:5])}")
        return Parameters(names, self._tensors, self._shards)

    def abort(self) -> None:
        """Close the open file, if any; what was written is the caller's to remove."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_shard(self) -> None:
        self._name = f"{FOLDER}/shard-{len(self._shards):05d}.bin"
        self._file = open(self._directory / self._name, "wb")
        self._offset = 0
        self._sha256 = hashlib.sha256()
        self._blocks: list[int] = []
        self._block_crc = 0

    def _write(self, data: memoryview) -> None:
        assert self._file is not None
        while len(data):
            room = BLOCK_BYTES - self._offset % BLOCK_BYTES
            piece, data = data[:room], data[room:]
            self._file.write(piece)
            self._sha256.update(piece)
            self._block_crc = zlib.crc32(piece, self._block_crc)
            self._offset += len(piece)
            if self._offset % BLOCK_BYTES == 0:
                self._blocks.append(self._block_crc)
                self._block_crc = 0

    def _close_shard(self) -> None:
        assert self._file is not None
        if self._offset % BLOCK_BYTES:
            self._blocks.append(self._block_crc)
        self._file.flush()
        self._file.close()
        self._file = None
        self._shards.append(
            ShardRecord(
                self._name, self._offset, self._sha256.hexdigest(), BLOCK_BYTES, self._blocks
            )
        )


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file privately, so that nothing written to it reaches the disk."""
    with open(path, "rb") as file:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=protection)


def open_parameters(
    directory: Path | str, parameters: Parameters, huge_pages: bool = False
) -> dict[str, np.ndarray]:
    """Return every tensor of the order as a view into its shard.

    Parameters
    ----------
    directory : Path or str
        The artifact.
    parameters : Parameters
        From its manifest.
    huge_pages : bool
        Read the shards into memory of 2 MiB pages (see `amx_tvm.artifact.memory`) instead of
        mapping them, where nothing is read yet.

    Returns
    -------
    dict of str to ndarray
        The arrays keep their memory alive; treat them as read-only.
    """
    root = Path(directory)
    held: dict[int, np.ndarray] = {}
    arrays: dict[str, np.ndarray] = {}
    for name in parameters.order:
        record = parameters.tensors[name]
        if not record.bytes:
            arrays[name] = np.empty(record.shape, record.dtype)
            continue
        if record.shard not in held:
            file = root / parameters.shards[record.shard].file
            held[record.shard] = (
                read_to_huge_pages(file) if huge_pages else np.frombuffer(map_file(file), np.uint8)
            )
        raw = held[record.shard][record.offset : record.offset + record.bytes]
        arrays[name] = raw.view(record.dtype).reshape(record.shape)
    return arrays
