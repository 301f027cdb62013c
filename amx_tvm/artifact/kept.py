"""The artifacts that `amx-tvm run` keeps in the user's cache: what there is, and its end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amx_tvm.artifact.manifest import Manifest
from amx_tvm.errors import ArtifactError
from amx_tvm.user_cache import cache_folder


@dataclass(frozen=True)
class Kept:
    """A kept artifact: its folder, what it holds ("" where it cannot be read), and its bytes."""

    path: Path
    model: str
    quantization: str
    target: str
    bytes: int


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an artifact's folder."""
    return (Path(path) / "manifest.json").is_file()


def kept_artifacts() -> list[Kept]:
    """Return all kept artifacts by name."""
    folders = kept_folder().iterdir() if kept_folder().is_dir() else ()
    return [_read(path) for path in sorted(folders) if path.is_dir() and path.name[0] != "."]


def remove_kept(names: Sequence[str]) -> list[Kept]:
    """Remove kept artifacts and return what they were.

    Parameters
    ----------
    names : sequence of str
        Names of folders or of models, or beginnings of a folder's name.

    Raises
    ------
    ArtifactError
        For a name that is none of them, or the beginning of several; nothing is removed then.
    """
    there, chosen = kept_artifacts(), []
    for name in names:
        found = [one for one in there if name in (one.path.name, one.model)]
        found = found or [one for one in there if name and one.path.name.startswith(name)]
        if len(found) != 1:
            known = ", ".join(one.path.name for one in found or there) or "none"
            problem = "names several kept artifacts" if found else "is no kept artifact"
            raise ArtifactError(f"{name!r} {problem}; expected one of: {known}")
        chosen += [one for one in found if one not in chosen]
    for one in chosen:
        shutil.rmtree(one.path)
    for link in kept_folder().glob(".asked-*"):  # of amx_tvm.cli.asked
        if not link.exists():
            link.unlink(missing_ok=True)
    return chosen


def kept_folder() -> Path:
    """Return where they are kept; it may not exist yet."""
    return cache_folder("artifacts")


def _read(path: Path) -> Kept:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    try:
        manifest = Manifest.load(path)
    except ArtifactError:
        return Kept(path, "", "", "", size)
    formats = str(manifest.quantization.get("format", ""))
    return Kept(path, str(manifest.model.get("name", "")), formats, manifest.target.key, size)
