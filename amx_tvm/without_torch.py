"""Let this project import TVM without torch, where nobody has imported torch yet.

tvm_ffi and one module of TVM import torch wherever it is installed: seconds of processor time, and
hundreds of megabytes, for torch's own tensors and types handed to them. This project hands tensors
over by DLPack, and imports torch where it needs it. Each of these imports is in a ``try`` that
allows for a machine without torch, so it is told that there is none.

Only modules that Python has loaded at its start are imported here.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from typing import Any

from amx_tvm import shadowing

# What imports torch while `import tvm` runs (TVM 0.27, tvm_ffi 0.1.14): packages and modules.
_IMPORTERS = ("tvm_ffi", "tvm.relax.base_py_module")


def watch() -> None:
    """Look at every import of torch from now on."""
    if PathFinder in sys.meta_path and _Watch not in sys.meta_path:
        sys.meta_path.insert(sys.meta_path.index(PathFinder), _Watch)


class _Watch:
    """A finder that finds nothing, before the one that looks in ``sys.path``."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        """Tell TVM that there is no torch, where it is imported for this project's code."""
        if name == "torch" and _asked_by_tvm() and shadowing.for_this_project():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _asked_by_tvm() -> bool:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    asking = str(frame.f_globals.get("__name__"))
    return any(asking == name or asking.startswith(name + ".") for name in _IMPORTERS)
