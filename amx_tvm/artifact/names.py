"""The directory of an artifact that nobody named: ``dist/NAME-LABEL``.

A model's name comes out of a file that somebody else wrote (``general.name`` of a GGUF file, a
directory, a hub id). It is a text and not a path: only letters, digits and a few signs of it reach
the file system.
"""

from __future__ import annotations

import re
from pathlib import Path

DIRECTORY = "dist"
_OTHER_SIGNS = re.compile(r"[^\w.+]+")
# A file name has at most 255 bytes; the label, and what the writer puts around it, need some.
_NAME_BYTES = 128


def default_output(name: str, label: str) -> Path:
    """Return where an artifact goes by default.

    Parameters
    ----------
    name : str
        The model's name, any text.
    label : str
        How it is compiled, such as "amxfp4-strict".

    Returns
    -------
    Path
        A directory directly inside ``dist``, relative to the current one.
    """
    # Separators and control characters become "-"; a leading "." would hide the directory or leave
    # dist/, a leading "-" looks like an option.
    kept = _OTHER_SIGNS.sub("-", name).strip("-.")
    kept = kept.encode("utf-8", "ignore")[:_NAME_BYTES].decode("utf-8", "ignore")
    return Path(DIRECTORY) / f"{kept or 'model'}-{label}"
