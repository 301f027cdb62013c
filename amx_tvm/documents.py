"""Test and calibration text from files: one text file, JSON lines, or a data set's directory.

file.txt .md .rst ...      the whole file is one document
file.jsonl                 one document a line: the "text" field of each object
file.json                  a list of such objects, or of strings
file.parquet               the "text" column (needs pyarrow)
directory                  all of the above in it, sorted by path; a data set's other files
(README, pictures, archives) are left out by their suffix
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from amx_tvm.errors import EvaluationError

PLAIN = (".txt", ".md", ".rst", ".text", ".raw", ".tokens")
FIELD = "text"


def read_documents(path: str | os.PathLike[str], field: str = FIELD) -> Iterator[str]:
    """Read the documents of a file or directory.

    Parameters
    ----------
    path : a file of any suffix above (an unknown suffix counts as plain text), or a directory
    field : name of the text field of JSON objects and parquet columns

    Raises
    ------
    EvaluationError
        When nothing is there, a file cannot be read as its suffix says, or a field is missing.
    """
    place = Path(path)
    if not os.fspath(path):
        raise EvaluationError("the path of the text is empty; expected a text file or a directory")
    if place.is_dir():
        readable = (*PLAIN, *_STRUCTURED)
        files = sorted(p for p in place.rglob("*") if p.suffix.lower() in readable and p.is_file())
        files = [p for p in files if not p.name.upper().startswith(("README", "LICENSE"))]
        if not files:
            raise EvaluationError(
                f"the directory {place} holds no text; expected files ending in "
                + ", ".join(readable)
            )
        for file in files:
            yield from _read(file, field)
        return
    if not place.is_file():
        raise EvaluationError(f"{place} does not exist; expected a text file or a directory")
    yield from _read(place, field)


def read_text(path: str | os.PathLike[str], field: str = FIELD, joint: str = "\n\n") -> str:
    """Read all documents as one text, as the published WikiText-2 protocol joins them."""
    return joint.join(read_documents(path, field))


def _read(path: Path, field: str) -> Iterator[str]:
    reader = _STRUCTURED.get(path.suffix.lower())
    try:
        if reader is None:
            yield path.read_text(encoding="utf-8")
            return
        for number, row in enumerate(reader(path, field)):
            value = row.get(field) if isinstance(row, dict) else row
            if not isinstance(value, str):
                known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                what = f"no text field {field!r}; it has: {known}"
                if isinstance(row, dict) and field in row:
                    what = f"no text in its field {field!r}, but a {type(value).__name__}"
                raise EvaluationError(f"entry {number} of {path} has {what}")
            value.encode()  # JSON may escape half a character, which no tokenizer takes
            yield value
    except RecursionError:
        raise EvaluationError(f"{path} cannot be read: its JSON is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path} cannot be read as {path.suffix or 'text'}: {error}"
        ) from None


def _json_lines(path: Path, _field: str) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _json(path: Path, _field: str) -> Iterator[Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    yield from value if isinstance(value, list) else [value]


def _parquet(path: Path, field: str) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise EvaluationError(
            f"{path} is a parquet file, which needs pyarrow; install it, or give the text as "
            ".txt or .jsonl"
        ) from None
    table = parquet.ParquetFile(path)
    if field not in table.schema_arrow.names:
        known = ", ".join(table.schema_arrow.names)
        raise EvaluationError(f"{path} has no column {field!r}; it has: {known}")
    for batch in table.iter_batches(columns=[field]):
        yield from (value or "" for value in batch.column(0).to_pylist())


_STRUCTURED: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
