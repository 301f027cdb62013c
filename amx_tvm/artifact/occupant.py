"""Whether a path still leads to the directory that it led to before.

An artifact that is written anew takes its name in one step, but whoever reads it opens one file
after another, and may so get files of both. The reader holds the directory meanwhile, looks again
at the end, and reads once more where another one is there now.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from amx_tvm.errors import ArtifactError

_F = TypeVar("_F", bound=Callable[..., Any])
_TRIES = 20


class Occupant:
    """Context manager that holds what is at a path, so that nothing else gets its identity.

    Parameters
    ----------
    path : Path
        A directory; where nothing is there, it counts as unchanged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = -1

    def __enter__(self) -> Occupant:
        try:
            self._held = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError):
            self._held = -1
        return self

    def __exit__(self, *_: object) -> None:
        if self._held >= 0:
            os.close(self._held)

    @property
    def replaced(self) -> bool:
        """Whether something else, or for a moment nothing, has come to the path."""
        if self._held < 0:
            return False
        try:
            return not os.path.samestat(os.fstat(self._held), os.stat(self._path))
        except FileNotFoundError:
            return True


def one_directory(read: _F) -> _F:
    """Let a function of a path and more read again where another directory has come to the path."""

    @wraps(read)
    def run(path: Path | str, *given: Any, **named: Any) -> Any:
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
            raise ArtifactError(f"the artifact is {path!r}, expected the path of a directory")
        for _ in range(_TRIES):
            with Occupant(Path(path)) as there:
                try:
                    # Taken out again: a frame may outlive its call, in the trace of an error that
                    # something keeps, and what it holds would live as long.
                    made = [read(path, *given, **named)]
                except (ArtifactError, OSError):
                    if not there.replaced:
                        raise
                else:
                    if not there.replaced:
                        return made.pop()
                    del made
        raise ArtifactError(
            f"{path} was replaced {_TRIES} times while it was read; wait until it is written"
        )

    return cast(_F, run)
