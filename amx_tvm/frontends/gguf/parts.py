"""The files of one GGUF model: a single one, or all parts that gguf-split made of it.

Parts say in their metadata which they are ("split.no" of "split.count"), whatever their files are
called; gguf-split's names, STEM-00001-of-00002.gguf, find them without opening others.
"""

from __future__ import annotations

import re
from pathlib import Path

from amx_tvm.errors import ModelError
from amx_tvm.frontends.gguf.file import GgufFile

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def open_parts(path: Path) -> list[GgufFile]:
    """Open a file, or all parts of the split model that it is a part of, in order.

    Raises
    ------
    ModelError
        When a part is missing, or the parts are not those of one model.
    """
    opened = GgufFile(path)
    count = _integer(opened, "split.count")
    match = _PART.fullmatch(path.name)
    if match and opened.metadata.get("split.no", int(match[2]) - 1) != int(match[2]) - 1:
        match = None  # renamed: what the file says of itself counts
    if match and count in (0, int(match[3])):
        stem, count = match[1], int(match[3])
        paths = [path.with_name(f"{stem}-{n:05d}-of-{match[3]}.gguf") for n in range(1, count + 1)]
        for part in paths:
            if not part.is_file():
                raise ModelError(
                    f"part {part.name} of {path} is missing: a model split into {count} files "
                    "needs all of them in one directory"
                )
        files = [opened if part == path else GgufFile(part) for part in paths]
    elif count > 1:
        files = _find_parts(opened, count)
    else:
        return [opened]
    _check(files, path)
    return files


def gguf_in(directory: Path) -> Path | None:
    """Return the only model of a directory, of a split one its first part; None without any.

    Raises
    ------
    ModelError
        When it holds several models, listing them.
    """
    files = sorted(directory.glob("*.gguf"))
    first = [file for file in files if _is_first(file, files)]
    if len(first) > 1:
        raise ModelError(
            f"{directory} holds {len(first)} GGUF models: {', '.join(f.name for f in first)}; name "
            "one of them"
        )
    return next(iter(first or files), None)


def _is_first(path: Path, files: list[Path]) -> bool:
    """Whether a file is a model or the first part of one, by its name or by what it says."""
    match = _PART.fullmatch(path.name)
    if match:
        first = path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf")
        if first in files:
            return path == first
    file = GgufFile(path)
    return _integer(file, "split.count") < 2 or _integer(file, "split.no") == 0


def _find_parts(opened: GgufFile, count: int) -> list[GgufFile]:
    """Find the other parts of a renamed one by what the files beside it say of themselves."""
    found: dict[int, list[GgufFile]] = {_integer(opened, "split.no"): [opened]}
    for path in sorted(opened.path.parent.glob("*.gguf")):
        if path == opened.path:
            continue
        try:
            file = GgufFile(path)
        except ModelError:
            continue  # a damaged neighbour is no part of this model
        number = _integer(file, "split.no")
        own = number in found and found[number][0] is opened
        if _integer(file, "split.count") == count and not own:
            found.setdefault(number, []).append(file)
    for number in range(count):
        candidates = found.get(number, [])
        if len(candidates) != 1:
            beside = ", ".join(file.path.name for file in candidates) or "none"
            raise ModelError(
                f"{opened.path} is a part of a model split into {count} files, and part "
                f"{number + 1} was looked for beside it (found: {beside}); put all parts of the "
                f"one model into one directory, named as gguf-split does: "
                f"NAME-00001-of-{count:05d}.gguf"
            )
    return [found[number][0] for number in range(count)]


def _check(files: list[GgufFile], path: Path) -> None:
    """Refuse parts in another order, or of different models."""
    for number, file in enumerate(files):
        given = file.metadata.get("split.no", number)
        if given != number:
            raise ModelError(
                f"{file.path} says it is part {given + 1}, its name says {number + 1}; give the "
                "parts their own names back"
            )
    total = files[0].metadata.get("split.tensors.count")
    held = sum(len(file.tensors) for file in files)
    names = {name for file in files for name in file.tensors}
    if len(names) != held or total not in (None, held):
        raise ModelError(
            f"the parts of {path} hold {held} tensors, {len(names)} of them different, where "
            f"{total if total is not None else held} were expected: they are not of one model"
        )


def _integer(file: GgufFile, key: str) -> int:
    value = file.metadata.get(key, 0)
    return value if isinstance(value, int) else 0
