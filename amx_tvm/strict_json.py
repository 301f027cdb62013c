"""JSON that somebody else wrote: files of a bounded size, texts of a bounded depth.

Every file of others that holds JSON is read here, so that each is refused in the same way: one
error of the caller's class that names the file. What the values must be is `amx_tvm.schema`'s part.
"""

from __future__ import annotations

import json
import os
import re
import stat
from typing import Any

from amx_tvm.errors import AmxError

# Python needs up to 25 times a text's bytes for its values: these stay below a gigabyte. A
# tokenizer of 260 000 tokens has two million values.
MAX_BYTES = 32 << 20
MAX_VALUES = 1 << 22
MAX_DEPTH = 64  # json and whatever walks a value later recurse; Python allows some hundred levels
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def read_json(
    path: str | os.PathLike[str],
    error: type[AmxError],
    hint: str = "",
    limit: int = MAX_BYTES,
) -> Any:
    """Return the JSON value of a file.

    Parameters
    ----------
    path : path-like
        A regular file.
    error : type
        The class of what is raised.
    hint : str
        What to do about a bad file; added to the message.
    limit : int
        Most bytes of the file.

    Raises
    ------
    FileNotFoundError
        When nothing is there: only the caller knows what that means.
    AmxError
        Of the class ``error``, for a file that cannot be read or as :func:`parse_json` says.
    """
    return parse_json(read_bytes(path, error, limit), path, error, hint)


def read_bytes(
    path: str | os.PathLike[str], error: type[AmxError], limit: int = MAX_BYTES
) -> bytes:
    """Return what a regular file of at most ``limit`` bytes holds; errors as `read_json`'s.

    A named pipe or a device would otherwise be waited for or read without end.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            info = os.fstat(file.fileno())
            data = b"" if info.st_size > limit else file.read(limit + 1)
            if info.st_size > limit or len(data) > limit:
                raise error(
                    f"{os.fspath(path)} has {info.st_size} bytes; at most {limit} are read of such "
                    "a file"
                )
            return data
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as problem:  # ValueError: a path with a NUL
        raise error(f"{os.fspath(path)!s} cannot be read: {problem}") from None


def open_regular(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file as `os.open` does; an opener for ``open`` that takes regular files only.

    Raises
    ------
    OSError
        When it is a named pipe, a device or a directory, or cannot be opened.
    """
    # Without O_NONBLOCK opening a pipe waits for somebody who writes to it.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no regular file")
    return descriptor


def read_text(path: str | os.PathLike[str], error: type[AmxError], limit: int = MAX_BYTES) -> str:
    """Return the UTF-8 text of a file; errors as `read_json`'s."""
    try:
        return read_bytes(path, error, limit).decode()
    except UnicodeDecodeError as problem:
        raise error(f"{os.fspath(path)} is no UTF-8 text: {problem}") from None


def parse_json(
    data: bytes | str,
    source: object,
    error: type[AmxError],
    hint: str = "",
    unique: bool = False,
) -> Any:
    """Return the value of a JSON text.

    Parameters
    ----------
    data : bytes or str
        UTF-8.
    source : object
        What the text is, for messages.
    error, hint
        See :func:`read_json`.
    unique : bool
        Refuse an object that has a key twice.

    Raises
    ------
    AmxError
        Of the class ``error``, for a text that is no JSON, is nested deeper than ``MAX_DEPTH``, has
        more than ``MAX_VALUES`` values, or holds half of a surrogate pair, which no file or
        tokenizer can hold.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    behind = f"; {hint}" if hint else ""
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise error(f"{source} has more than {MAX_VALUES} values, which no such file has{behind}")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique if unique else None)
        if depth_of(value) > MAX_DEPTH:
            raise RecursionError
        if _ESCAPED_SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise error(
            f"{source} is nested deeper than {MAX_DEPTH} levels, which no such file is{behind}"
        ) from None
    except UnicodeEncodeError:
        raise error(f"{source} holds half of a surrogate pair, which is no text{behind}") from None
    except ValueError as problem:  # no JSON, no UTF-8, or a number of thousands of digits
        raise error(f"{source} cannot be read as JSON: {problem}{behind}") from None
    return value


def depth_of(value: Any) -> int:
    """Return how many levels of objects and lists a value has; 0 for a text or a number."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [
            child for item in level for child in (item.values() if type(item) is dict else item)
        ]
    return depth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands in one object twice")
    return found
