"""Write an artifact: its files into a directory that a `Publication` gives its name at the end.

A partial directory has no manifest until its last moment, so it never loads.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from amx_tvm.artifact import signature
from amx_tvm.artifact.manifest import FILE_NAME, LibraryRecord, Manifest
from amx_tvm.artifact.publication import Publication, is_empty
from amx_tvm.artifact.shards import SHARD_BYTES, ParameterWriter
from amx_tvm.errors import ArtifactError


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
    key : private key, optional
        By which the artifact is signed; see `amx_tvm.artifact.signature`.

    Examples
    --------
    >>> with ArtifactWriter("dist/model") as writer:             # doctest: +SKIP
    ...     executable.export_library(writer.path("lib.so"))
    ...     writer.parameters.add("weight", array)
    ...     writer.finish(manifest)
    """

    def __init__(
        self,
        output: Path | str,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        key: Any = None,
    ):
        self._key = key
        self.output = Path(os.path.abspath(output))
        self._overwrite = overwrite
        self._shard_bytes = shard_bytes
        self._finished = False
        self._stack = ExitStack()
        self.publication = Publication(self.output)
        self.directory = self.publication.path

    def __enter__(self) -> ArtifactWriter:
        with ExitStack() as stack:
            stack.enter_context(self.publication)
            check_replaceable(self.output, self._overwrite)
            self.directory.mkdir()
            self.parameters = ParameterWriter(self.directory, self._shard_bytes)
            stack.callback(self.parameters.abort)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None and not self._finished:
            raise ArtifactError(f"{self.output}: the artifact was left without finish()")

    def path(self, name: str) -> Path:
        """Return where a file of the artifact is to be written now."""
        return self.directory / name

    def library(self, name: str = "lib.so") -> LibraryRecord:
        """Return the record of the library that was written to ``path(name)``."""
        file = self.path(name)
        return LibraryRecord(name, file.stat().st_size, file_sha256(file))

    def finish(self, manifest: Manifest) -> Manifest:
        """Complete the artifact and give it its name; see :func:`complete`.

        ``manifest.parameters`` comes from ``self.parameters.finish(order)``.

        Returns
        -------
        Manifest
            What was written.
        """
        manifest = complete(self.directory, manifest, self.output, self._key)
        check_replaceable(self.output, self._overwrite)
        self.publication.publish(self._overwrite)
        self._finished = True
        return manifest


def complete(directory: Path, manifest: Manifest, output: Path, key: Any = None) -> Manifest:
    """Write the manifest of a directory that holds everything else, and sign it; return it.

    Files other than the library and the shards are added to ``manifest.files`` with
    their digests.

    Parameters
    ----------
    directory : Path
        The artifact, still under another name.
    manifest : Manifest
    output : Path
        The name for errors.
    key : private key, optional
        Of whoever answers for it.
    """
    known = {manifest.library.file, FILE_NAME, signature.FILE_NAME}
    known.update(shard.file for shard in manifest.parameters.shards)
    extra = {}
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory).as_posix()
        if file.is_file() and name not in known:
            extra[name] = file_sha256(file)
    manifest = replace(manifest, files=extra)
    manifest.check(str(output))
    manifest.save(directory)
    if key is not None:
        signature.sign(directory, manifest.digest, key)
    return manifest


def check_replaceable(output: Path, overwrite: bool) -> None:
    """Refuse an output that must not be replaced; early, before hours of compilation.

    Raises
    ------
    ArtifactError
        For anything but an artifact, and for an artifact without ``overwrite``.
    """
    if not os.path.lexists(output) or is_empty(output):
        return
    if not output.is_dir() or not (output / FILE_NAME).is_file():
        raise ArtifactError(
            f"{output} exists and is not an artifact, so it is never replaced; choose "
            "another --output or remove it yourself"
        )
    if not overwrite:
        raise ArtifactError(
            f"{output} holds an artifact already; choose another --output, or pass "
            "--overwrite (overwrite=True) to replace it"
        )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
    return digest.hexdigest()
