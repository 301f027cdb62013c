"""JSON-lines files that survive being killed: one write and one fsync a line.

A line is complete when it ends in a newline and parses. What a killed process left behind is a last
line without its newline; it is reported, never read, and the next append starts on a line of its
own.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from amx_tvm.artifact.publication import Publication, room, try_lock
from amx_tvm.errors import TuningError
from amx_tvm.strict_json import parse_json


@dataclass(frozen=True)
class Damage:
    """A line that cannot be read: its number, from 1, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def lock(path: str | os.PathLike[str]) -> IO[bytes]:
    """Lock a log for one session, through a file beside it, until the returned file is closed.

    The lock goes with its process, however that ends.

    Raises
    ------
    TuningError
        When another session has it.
    """
    path = Path(path)
    with _explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(path.name + ".lock"), "wb")
    try:
        try_lock(file.fileno())
    except BlockingIOError as error:
        file.close()
        raise TuningError(
            f"another session is tuning into {path.parent}; wait for it, or give another directory"
        ) from error
    return file


def append(path: str | os.PathLike[str], entry: dict[str, Any]) -> None:
    """Append one entry; when this returns, the line is on the disk.

    Several processes may append to one file: a lock orders them.

    Raises
    ------
    TuningError
        When the disk does not take the line; nothing of it stays.
    """
    path = Path(path)
    line = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # seals off the torn line of a killed process
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)  # no part of the line stays
                raise
        finally:
            os.close(descriptor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Name the file of an OSError, and what there is room for."""
    try:
        yield
    except OSError as error:
        free = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = f", {room(path.parent)}"
        raise TuningError(
            f"cannot write {path}: {error.strerror}{free}; make room or choose another directory, "
            "and the same command continues"
        ) from error


def read(path: str | os.PathLike[str]) -> tuple[list[tuple[int, dict[str, Any]]], list[Damage]]:
    """Return (line number, entry) of the complete lines in order, and what could not be read."""
    entries: list[tuple[int, dict[str, Any]]] = []
    damage: list[Damage] = []
    text = Path(path).read_bytes()
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line, "the line", TuningError)
            if not isinstance(entry, dict):
                raise TuningError("the line is no JSON object")
        except TuningError as error:
            last = number == text.count(b"\n") + 1
            reason = "torn last line, its writer was killed" if last else f"unreadable: {error}"
            damage.append(Damage(str(path), number, reason))
            continue
        entries.append((number, entry))
    return entries, damage


def replace(path: str | os.PathLike[str], entries: Iterable[dict[str, Any]]) -> None:
    """Write a whole file anew: readers see the old one or the new one, never a part.

    Raises
    ------
    ArtifactError
        When the place cannot be written, or another run is writing it.
    """
    with Publication(path) as new:
        with open(new.path, "w", encoding="utf-8") as file:
            for entry in entries:
                file.write(json.dumps(entry, sort_keys=True, separators=(",", ":")) + "\n")
        new.publish(replace=True)
