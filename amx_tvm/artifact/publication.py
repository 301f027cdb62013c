"""Make a directory or a file so that it exists completely or not at all.

Everything is made in a hidden sibling on the same file system and comes to its name in one step::

    NAME                  what readers see: nothing, the old one or the new one
    .NAME.partial/lock    held by the run that writes; a second run is refused
    .NAME.partial/new     what will be NAME; after an exchange, what NAME was

Any exception, Ctrl-C included, removes the sibling; what a killed run left is removed by the next
run into the same place. Runs know each other by the lock, not by process ids, which containers that
share a volume have in common; where a file system has no locks, nothing keeps two runs apart.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from amx_tvm.errors import AmxError, ArtifactError

_SUFFIX = ".partial"
_AT_FDCWD = -100
_NO_REPLACE, _EXCHANGE = 1, 2  # flags of renameat2, linux/fs.h
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


class Publication:
    """Context manager around making one directory or file; see the module's docstring.

    Parameters
    ----------
    output : path
        The name it will have. Its parent is created.
    instead : str
        What a user does where that cannot be, the end of errors.

    Attributes
    ----------
    workspace : Path
        A directory on the output's file system for whatever is needed meanwhile.
    path : Path
        Where to make the new directory or file, below ``workspace``.
    """

    def __init__(
        self, output: str | os.PathLike[str], instead: str = "choose another --output"
    ) -> None:
        self.output = Path(os.path.abspath(output))
        self.workspace = self.output.parent / f".{self.output.name}{_SUFFIX}"
        self.path = self.workspace / "new"
        self._asked = _asked_for(self.output)
        self._instead = instead
        self._lock = -1

    def __enter__(self) -> Publication:
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._sweep()
        except OSError as error:
            self._leave()
            raise self._explain(error) from error
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        full = error is not None and free_bytes(self.output.parent) < 64 << 10
        self._leave()
        if isinstance(error, OSError) and self._is_mine(error):
            raise self._explain(error) from error
        if full and isinstance(error, Exception) and not isinstance(error, AmxError):
            # Whatever ran out of space says so in its own words.
            raise self._explain(OSError(errno.ENOSPC, "no space left")) from error

    def require(self, size: int) -> None:
        """Refuse to begin where so many bytes have no room.

        Raises
        ------
        ArtifactError
            With both numbers.
        """
        if free_bytes(self.output.parent) < size:
            raise ArtifactError(
                f"no space left: {self._asked} needs {bytes_text(size)}, and "
                f"{room(self._asked.parent)}; free some space or {self._instead}"
            )

    def publish(self, replace: bool = False) -> None:
        """Give ``path`` its name, after everything below it has reached the disk.

        Parameters
        ----------
        replace : bool
            Exchange it for what is there, which is removed. An empty directory never counts.

        Raises
        ------
        ArtifactError
            When something is there that is not to be replaced.
        """
        for file in [*self.path.rglob("*"), self.path]:
            _sync(file)
        if not os.path.lexists(self.output):
            try:
                _rename(self.path, self.output, _NO_REPLACE)
            except FileExistsError:
                raise self._taken() from None
        elif self.path.is_dir() and is_empty(self.output):
            os.rename(self.path, self.output)
        elif replace:
            _rename(self.path, self.output, _EXCHANGE)
        else:
            raise self._taken()
        _sync(self.output.parent)

    def _taken(self) -> ArtifactError:
        return ArtifactError(
            f"{self.output} was made by another run in the meantime; {self._instead}, or "
            "pass --overwrite to replace it"
        )

    def _acquire(self) -> None:
        """Take the lock of the place, the one that is there at its name once it is taken."""
        name = self.workspace / "lock"
        while True:
            self.workspace.mkdir(exist_ok=True)
            if self.workspace.is_symlink():  # a stranger's, who would have its target emptied
                raise ArtifactError(
                    f"{self.workspace} is a link, and what lies there would be removed; remove the "
                    f"link or {self._instead}"
                )
            try:
                self._lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                try_lock(self._lock)
                if os.path.samestat(os.fstat(self._lock), os.stat(name)):
                    return
            except FileNotFoundError:  # its owner has just removed it
                pass
            except BlockingIOError:
                os.close(self._lock)
                self._lock = -1
                raise ArtifactError(
                    f"another run is writing {self.output}; wait until it has ended, or "
                    f"{self._instead}"
                ) from None
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def _sweep(self) -> None:
        """Remove what a killed run left; give back what it was about to replace."""
        old = self.workspace / "old"
        if os.path.lexists(old) and not os.path.lexists(self.output):
            os.rename(old, self.output)
        for path in self.workspace.iterdir():
            if path.name != "lock":
                _remove(path)

    def _leave(self) -> None:
        """Remove the workspace, the lock last: with it goes the right to remove anything."""
        with suppress(OSError):
            if self._lock >= 0:
                self._sweep()
                (self.workspace / "lock").unlink()
            self.workspace.rmdir()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _is_mine(self, error: OSError) -> bool:
        """Whether an OSError is about writing here, not about a file that is read."""
        if error.errno in (*_NO_SPACE, errno.EROFS):
            return True
        return str(error.filename or "").startswith(str(self.workspace))

    def _explain(self, error: OSError) -> ArtifactError:
        if error.errno in _NO_SPACE:
            return ArtifactError(
                f"no space left for {self._asked}: {room(self._asked.parent)}; nothing was kept: "
                f"free some space or {self._instead}"
            )
        return ArtifactError(
            f"cannot write {self._asked}: {error.strerror or error}; nothing was kept: "
            f"{self._instead}"
        )


def _asked_for(path: Path) -> Path:
    """Return what the user named: of something inside a workspace, what that is for."""
    for parent in path.parents:
        if parent.name.startswith(".") and parent.name.endswith(_SUFFIX):
            return _asked_for(parent.with_name(parent.name[1 : -len(_SUFFIX)]))
    return path


def is_empty(path: Path) -> bool:
    """Whether a path is a directory, and no link, without entries."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def room(place: Path) -> str:
    """Say how much is free at a place, for errors."""
    return f"{bytes_text(free_bytes(place))} are free under {place}"


def bytes_text(size: int) -> str:
    """Return a number of bytes in kB, or in MB or GB where there are many."""
    if size >= 10e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 10e6 else f"{size / 1e3:.0f} kB"


def free_bytes(place: Path) -> int:
    """Bytes that are free on a file system; 0 where nothing is known."""
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return 0


def try_lock(descriptor: int) -> None:
    """Lock a file, or do nothing where its file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.ENOLCK):
            raise


def _rename(source: Path, target: Path, flag: int) -> None:
    """Rename with a flag of renameat2; in two steps where system or file system lack it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        names = os.fsencode(source), os.fsencode(target)
        if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flag) == 0:
            return
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code), str(target))
    if flag == _EXCHANGE:
        os.rename(
            target, source.with_name("old")
        )  # the next run gives it back if this one ends here
    os.rename(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
