"""Write a directory as a tar archive that depends on its content only.

Members are sorted, belong to nobody, carry no time, and are executable or not; the same directory
gives the same bytes.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import IO, cast

from amx_tvm.errors import ArtifactError

SUFFIXES = (".tar", ".tar.gz", ".tar.zst")


def is_archive(path: Path) -> bool:
    """Whether a path names an archive that `write_archive` can write."""
    return path.name.endswith(SUFFIXES)


def write_archive(directory: Path, output: Path, root: str) -> None:
    """Pack ``directory`` into ``output`` under the folder name ``root``.

    Raises
    ------
    ArtifactError
        For .tar.zst where the zstd tool is missing or fails.
    """
    check_tool(output)
    with open(output, "wb") as file:
        if output.name.endswith(".zst"):
            _through_zstd(directory, file, root)
        elif output.name.endswith(".gz"):
            with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                _write_tar(directory, cast(IO[bytes], packed), root)
        else:
            _write_tar(directory, file, root)


def check_tool(output: Path) -> None:
    """Refuse an archive whose tool is not installed.

    Raises
    ------
    ArtifactError
        With what installs it.
    """
    if output.name.endswith(".zst") and shutil.which("zstd") is None:
        raise ArtifactError(
            "a .tar.zst needs the zstd tool, which is not installed (Debian: apt-get install "
            "zstd); install it, or choose an output that ends in .tar.gz or .tar"
        )


def _through_zstd(directory: Path, file: IO[bytes], root: str) -> None:
    command = ["zstd", "--quiet", "-10", "--single-thread", "--stdout", "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file)
    assert process.stdin is not None
    with process.stdin as pipe:
        _write_tar(directory, pipe, root)
    if process.wait():
        raise ArtifactError(f"zstd failed with exit code {process.returncode}")


def _write_tar(directory: Path, file: IO[bytes], root: str) -> None:
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(directory.rglob("*"), key=lambda p: p.relative_to(directory).parts):
            info = tarfile.TarInfo(f"{root}/{path.relative_to(directory).as_posix()}")
            if path.is_dir():
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
                continue
            info.size = path.stat().st_size
            info.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            with open(path, "rb") as content:
                tar.addfile(info, content)
