"""A read-only memory-mapped file whose pages go back to the system after use.

A view into a mapping costs no copy, but every page that was touched counts as resident memory
until the kernel wants it back. Reading a model tensor by tensor would so show the whole file as
used memory; :meth:`MappedFile.release` drops the pages of one range (they are clean: reading them
again is correct, only slower).
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.strict_json import open_regular


class MappedFile:
    """One file, mapped for reading.

    Parameters
    ----------
    path : path-like
        An existing file.

    Raises
    ------
    ModelError
        When the file is missing, empty, a directory or not readable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb", opener=open_regular) as handle:
                self.size = os.fstat(handle.fileno()).st_size
                if self.size == 0:
                    raise ModelError(f"{self.path} is empty; download or copy it again")
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelError(f"{self.path} does not exist; check the path") from None
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL
            reason = getattr(error, "strerror", None) or str(error)
            raise ModelError(f"{self.path} cannot be read: {reason.lower()}") from None
        self.buffer = memoryview(self._map)

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """Return uint8 [nbytes] at ``offset``, read-only, without a copy."""
        return np.frombuffer(self.buffer, np.uint8, nbytes, offset)

    def release(self, offset: int, nbytes: int) -> None:
        """Let the system have back the memory of the pages that lie inside this range."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # a platform without it keeps the pages cached
            return
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)
