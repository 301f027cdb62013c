"""Files of the user's in the place of modules that this project's code needs.

Python looks in the script's folder (the current one under ``python -m``) and in PYTHONPATH before
it looks where modules are installed, so a ``yaml.py`` or ``random.py`` there is what every package
gets that wants the real one. :func:`watch` refuses such an import where this project's code, or a
package on its behalf, is about to do it; the user's own code gets what it asks for. What was
imported before that is for :func:`check`.

Only modules that Python has loaded at its start are imported here.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from amx_tvm.errors import AmxError

OWN = ("amx_tvm", "relax_passes", "tuning")
ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
# What this project's code imports of others: packages, so a single file of that name is none.
PACKAGES = (
    "cloudpickle cryptography gguf huggingface_hub jax jaxlib jinja2 llguidance lm_eval "
    "matplotlib ml_dtypes numpy onnx orjson prometheus_client psutil pydantic pydantic_core rich "
    "starlette tokenizers torch tornado tvm tvm_ffi typer uvicorn xgboost"
).split()


def watch() -> None:
    """Look for files in the way at every import of a top-level name from now on."""
    if PathFinder in sys.meta_path and _Watch not in sys.meta_path:
        sys.meta_path.insert(sys.meta_path.index(PathFinder), _Watch)


def check(*names: str) -> None:
    """Refuse to go on with a file in the place of a module, imported already or not.

    Raises
    ------
    AmxError
        With the file that is in the way.
    """
    for name in names:
        file = in_the_way(name)
        if file and getattr(sys.modules.get(name), "__file__", file) == file:
            raise _error(name, file)


def user_folders() -> list[str]:
    """Return where Python looks before its standard library."""
    library = os.path.dirname(os.__file__)
    return sys.path[: sys.path.index(library)] if library in sys.path else []


def in_the_way(name: str) -> str | None:
    """Return the file in the user's folders that is found in place of a module, if there is one.

    A copy of a package (a checkout of it) and what an installer has put there are not in the way.
    """
    folders = user_folders()
    found = PathFinder.find_spec(name, folders)
    if found is None or found.origin is None:
        return None
    file = found.origin
    folder = os.path.dirname(file)
    if found.submodule_search_locations is not None:
        folder = os.path.dirname(folder)
    if name in OWN:
        return None if os.path.realpath(folder) == ROOT else file
    if any(entry.endswith((".dist-info", ".egg-info")) for entry in os.listdir(folder or ".")):
        return None
    real = PathFinder.find_spec(name, [place for place in sys.path if place not in folders])
    if real is None:
        single = found.submodule_search_locations is None
        return file if single and name in PACKAGES else None
    return None if _alike(found, real) else file


def _alike(first: ModuleSpec, second: ModuleSpec) -> bool:
    """Say whether two packages have at least half of the second one's modules in common."""
    if not first.submodule_search_locations or not second.submodule_search_locations:
        return False
    mine, its = (
        {name for place in spec.submodule_search_locations or () for name in os.listdir(place)}
        for spec in (first, second)
    )
    return 2 * len(mine & its) >= len(its)


class _Watch:
    """A finder that finds nothing, before the one that looks in ``sys.path``."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        """Refuse a file in the way of an import for this project's code."""
        if path is None and (file := in_the_way(name)) and for_this_project():
            raise _error(name, file)


def for_this_project() -> bool:
    """Say whose import a finder is asked for.

    It is of the nearest caller, behind the finder's ``find_spec``, that is either this project's
    or the user's.
    """
    mine = user_folders()
    folders, installed = (
        tuple(os.path.join(os.path.realpath(place), "") for place in places)
        for places in (mine, [place for place in sys.path if place not in mine])
    )
    own = tuple(os.path.join(ROOT, name, "") for name in OWN)
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith("<"):  # Python's own, or code without a file
            file = os.path.realpath(file)
        if file.startswith(own):
            return True
        # What is installed may lie below a folder of the user's, as in .venv.
        inside = file.startswith(folders) and not file.startswith(installed)
        if inside or frame.f_globals.get("__name__") == "__main__":
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _error(name: str, file: str) -> AmxError:
    whose = "this project's package" if name in OWN else "the module"
    return AmxError(
        f"{os.path.abspath(file)} is in the way of {whose} `{name}`: Python finds it first; rename "
        "it, or start Python elsewhere"
    )
