"""JSON-lines files that survive being killed: one write and one fsync a line.

A line is complete when it ends in a newline and parses. What a killed process left behind is a last
line without its newline; it is reported, never read, and the next append starts on a line of its
own.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from amx_tvm.errors import TuningError


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
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path.with_name(path.name + ".lock"), "wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise TuningError(
            f"another session is tuning into {path.parent}; wait for it, or give another directory"
        ) from error
    return file


def append(path: str | os.PathLike[str], entry: dict[str, Any]) -> None:
    """Append one entry; when this returns, the line is on the disk.

    Several processes may append to one file: a lock orders them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # seals off the torn line of a killed process
        if os.write(descriptor, line) != len(line):
            raise OSError(f"{path}: the disk took only a part of a line")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> tuple[list[tuple[int, dict[str, Any]]], list[Damage]]:
    """Return (line number, entry) of the complete lines in order, and what could not be read."""
    entries: list[tuple[int, dict[str, Any]]] = []
    damage: list[Damage] = []
    text = Path(path).read_bytes()
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            last = number == text.count(b"\n") + 1
            reason = "torn last line, its writer was killed" if last else f"unreadable: {error}"
            damage.append(Damage(str(path), number, reason))
            continue
        entries.append((number, entry))
    return entries, damage


def replace(path: str | os.PathLike[str], entries: Iterable[dict[str, Any]]) -> None:
    """Write a whole file anew: readers see the old one or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".new")
    with open(scratch, "w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(entry, sort_keys=True, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
