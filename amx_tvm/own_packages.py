"""Whether ``relax_passes`` and ``tuning`` are this project's packages.

A file or folder of these names beside the user's script, or in the current directory under
``python -m``, is found before what is installed. Importing this module says so; whoever imports one
of the packages imports it first.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from amx_tvm.errors import AmxError

NAMES = ("relax_passes", "tuning")


def check() -> None:
    """Refuse to go on with a module that only has the name of one of the packages.

    Raises
    ------
    AmxError
        With the file that is in the way.
    """
    root = Path(__file__).resolve().parents[1]
    for name in NAMES:
        found = _file(name)
        if found is not None and found.resolve().parent != root / name:
            raise AmxError(
                f"{found} is imported in place of this project's package `{name}`; rename it, or "
                "start Python elsewhere"
            )


def _file(name: str) -> Path | None:
    """Return the file that a name is, or would be, imported from."""
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
    else:
        spec = find_spec(name)
        file = spec.origin if spec is not None else None
    return Path(file) if file else None


check()
