"""One bundle for a fleet: a library for each of several CPU levels over the same parameters.

    lib.so                  the least demanding level, for runtimes and CPUs of any age
    lib-x86-64-v4.so        a variant; manifest.json lists them, the most demanding first

Which one is loaded is decided by the CPU's features before anything of a library runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from amx_tvm.artifact import Manifest, Variant
from amx_tvm.artifact.manifest import LibraryRecord
from amx_tvm.compiler import Artifact
from amx_tvm.errors import TargetError
from amx_tvm.targets import ResolvedTarget, resolve


@dataclass(frozen=True)
class Level(ResolvedTarget):
    """A resolved target that knows the name it was asked for by."""

    name: str = ""


def resolve_levels(target: str | Sequence[str]) -> list[Level]:
    """Resolve one target or several, the least demanding first.

    Raises
    ------
    TargetError
        For an unknown name, and for several targets that no single bundle can serve.
    """
    names = target.split(",") if isinstance(target, str) else list(target)
    levels = []
    for name in dict.fromkeys(name.strip() for name in names):
        found = resolve(name)
        levels.append(Level(**vars(found), name=name))
    if not levels:
        raise TargetError("no target was given; expected a name, or several with commas between")
    if len(levels) > 1:
        for level in levels:
            same = level.device == "cpu" and level.triple == levels[0].triple
            if not same or level.layout != levels[0].layout:
                raise TargetError(
                    f"one bundle cannot serve {levels[0].name} and {level.name}: several targets "
                    "must be CPUs of one architecture, such as x86-64-v3,x86-64-v4"
                )
    return sorted(levels, key=lambda level: (len(level.features), level.name))


def with_variants(directory: Path, compiled: Sequence[Artifact]) -> Manifest:
    """Move the libraries of further artifacts into the first one's folder; return its manifest.

    Parameters
    ----------
    directory : Path
        Where the first artifact is now.
    compiled : sequence of Artifact
        The artifacts of all levels, the least demanding first.

    Raises
    ------
    TargetError
        If the levels' kernels read different parameters.
    """
    base = compiled[0].manifest
    variants = []
    for artifact in compiled[1:]:
        manifest = artifact.manifest
        if manifest.parameters != base.parameters:
            raise TargetError(
                f"the kernels of {manifest.target.key} read other parameters than those of "
                f"{base.target.key}; make a bundle for each"
            )
        cpu = re.sub(r"[^A-Za-z0-9.+-]+", "_", manifest.target.key.split("/")[-1])
        name = f"lib-{cpu}.so"
        os.rename(Path(artifact.path) / manifest.library.file, directory / name)
        library = LibraryRecord(name, manifest.library.bytes, manifest.library.sha256)
        variants.append(Variant(manifest.target, library))
    return replace(base, variants=variants[::-1])
