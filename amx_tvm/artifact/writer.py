"""Write an artifact so that it exists completely or not at all.

Everything goes into a hidden sibling, ``.NAME.partial-PID``, on the same file system. When all is
written and synced, one rename gives it its name. Any exception, Ctrl-C included, removes the
sibling; what a killed process left behind is removed by the next compile into the same place. A
partial directory has no manifest until its last moment, so it never loads.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from amx_tvm.artifact.manifest import FILE_NAME, LibraryRecord, Manifest
from amx_tvm.artifact.shards import SHARD_BYTES, ParameterWriter
from amx_tvm.errors import AmxError, ArtifactError


class ArtifactWriter:
    """Context manager that builds one artifact directory.

    Parameters
    ----------
    output : Path or str
        Where the artifact will be. Its parent is created; an existing artifact is only replaced
        with ``overwrite``, and a directory that is no artifact never.
    overwrite : bool
        Replace an existing artifact, in the moment the new one is complete.
    shard_bytes : int
        Size near which parameter shards are split.

    Examples
    --------
    >>> with ArtifactWriter("dist/model") as writer:             # doctest: +SKIP
    ...     executable.export_library(writer.path("lib.so"))
    ...     writer.parameters.add("weight", array)
    ...     writer.finish(manifest)
    """

    def __init__(self, output: Path | str, overwrite: bool = False, shard_bytes: int = SHARD_BYTES):
        self.output = Path(os.path.abspath(output))
        self._overwrite = overwrite
        self._shard_bytes = shard_bytes
        self._finished = False
        self.directory = self.output.parent / f".{self.output.name}.partial-{os.getpid()}"

    def __enter__(self) -> ArtifactWriter:
        self._check_output()
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir()
            self.parameters = ParameterWriter(self.directory, self._shard_bytes)
        except OSError as error:
            raise self._explain(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._finished and error is None:
            return
        self.parameters.abort()
        full = _is_full(self.output.parent)
        shutil.rmtree(self.directory, ignore_errors=True)
        if error is None:
            raise ArtifactError(f"{self.output}: the artifact was left without finish()")
        if isinstance(error, OSError) and _is_about(error, self.directory):
            raise self._explain(error) from error
        if full and isinstance(error, Exception) and not isinstance(error, AmxError):
            # A linker that ran out of space says so in its own words.
            raise self._explain(OSError(errno.ENOSPC, "no space left")) from error

    def path(self, name: str) -> Path:
        """Return where a file of the artifact is to be written now."""
        return self.directory / name

    def library(self, name: str = "lib.so") -> LibraryRecord:
        """Return the record of the library that was written to ``path(name)``."""
        file = self.path(name)
        return LibraryRecord(name, file.stat().st_size, file_sha256(file))

    def finish(self, manifest: Manifest) -> Manifest:
        """Complete the artifact: sync all files, write the manifest, rename into place.

        ``manifest.parameters`` comes from ``self.parameters.finish(order)``. Files other than the
        library and the shards are added to ``manifest.files`` with their digests.

        Returns
        -------
        Manifest
            What was written.
        """
        known = {manifest.library.file, FILE_NAME}
        known.update(shard.file for shard in manifest.parameters.shards)
        extra = {}
        for file in sorted(self.directory.rglob("*")):
            name = file.relative_to(self.directory).as_posix()
            if file.is_file() and name not in known:
                extra[name] = file_sha256(file)
        manifest = replace(manifest, files=extra)
        manifest.check(str(self.output))
        for file in self.directory.rglob("*"):
            _sync(file)
        manifest.save(self.directory)
        _sync(self.path(FILE_NAME))
        _sync(self.directory)
        self._check_output()
        old = self.output.parent / f".{self.output.name}.replaced-{os.getpid()}"
        if self.output.exists():
            os.rename(self.output, old)
        try:
            os.rename(self.directory, self.output)
        except BaseException:
            if old.exists():
                os.rename(old, self.output)
            raise
        self._finished = True
        _sync(self.output.parent)
        shutil.rmtree(old, ignore_errors=True)
        return manifest

    def _check_output(self) -> None:
        """Refuse an output that must not be replaced; early, before hours of compilation."""
        if not (self.output.exists() or self.output.is_symlink()):
            return
        if self.output.is_dir() and not any(self.output.iterdir()):
            return
        if not self.output.is_dir() or not (self.output / FILE_NAME).is_file():
            raise ArtifactError(
                f"{self.output} exists and is not an artifact, so it is never replaced; choose "
                "another --output or remove it yourself"
            )
        if not self._overwrite:
            raise ArtifactError(
                f"{self.output} holds an artifact already; choose another --output, or pass "
                "--overwrite (overwrite=True) to replace it"
            )

    def _remove_stale(self) -> None:
        """Remove partial directories of processes that no longer run."""
        for folder in self.output.parent.glob(f".{self.output.name}.partial-*"):
            owner = folder.name.rpartition("-")[2]
            if owner.isdigit() and not _is_running(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)

    def _explain(self, error: OSError) -> ArtifactError:
        place = self.output.parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(place).free if place.is_dir() else 0
            return ArtifactError(
                f"no space left: {self.output} needs more than the {free / 1e6:.0f} MB that are "
                f"free under {place}; nothing was kept: free some space or choose another --output"
            )
        return ArtifactError(
            f"cannot write {self.output}: {error.strerror or error}; nothing was kept: choose "
            "another --output"
        )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _is_full(place: Path) -> bool:
    """Whether less than a page group is left on a file system."""
    return place.is_dir() and shutil.disk_usage(place).free < 64 << 10


def _is_about(error: OSError, place: Path) -> bool:
    """Whether an OSError is about writing the artifact, not about a file it was made from."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    return error.filename is not None and str(error.filename).startswith(str(place))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
