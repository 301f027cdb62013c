"""A folder for temporary files, and errors that name it where it is missing or full."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amx_tvm.artifact.publication import room
from amx_tvm.errors import AmxError

_FULL = 64 << 10  # bytes: with less, whatever fails has failed for want of room


@contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """Make a temporary folder; it is removed at the end.

    Parameters
    ----------
    prefix : str
        Of its name.

    Raises
    ------
    AmxError
        Where it cannot be made, and where there is no room for what is written into it: with the
        place and what is free there.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:
        raise AmxError(
            f"temporary files have no place ({error.strerror}); set TMPDIR to a folder that can "
            "be written"
        ) from error
    with folder:
        try:
            yield Path(folder.name)
        except AmxError:
            raise
        except Exception as error:
            parent = Path(folder.name).parent
            if not _for_want_of_room(error, folder.name):
                raise
            raise AmxError(
                f"no space left for temporary files: {room(parent)}; free some space, or set "
                "TMPDIR to another folder"
            ) from error


def _for_want_of_room(error: Exception, folder: str) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return not error.filename or str(error.filename).startswith(folder)
    return shutil.disk_usage(folder).free < _FULL  # it says so in words of its own
