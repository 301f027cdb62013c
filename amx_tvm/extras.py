"""Packages that only some uses need, and the line that installs them.

The line names an extra of this package, so that versions are those of its metadata: by its name
where it is installed (from a wheel or a checkout), else by the folder of the checkout.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from amx_tvm.errors import AmxError

PLOTS = (".png", ".svg", ".pdf")


def require(module: str, extra: str, use: str, error: type[AmxError] = AmxError) -> Any:
    """Import a module of an optional package.

    Parameters
    ----------
    module : str
        Its full name.
    extra : str
        The extra in pyproject.toml that brings it.
    use : str
        What needs it, the beginning of the message.
    error : type
        What is raised.

    Raises
    ------
    AmxError
        When it cannot be imported, with the reason and the line that installs it.
    """
    try:
        return import_module(module)
    except ImportError as reason:
        raise error(
            f"{use} needs {module.partition('.')[0]}, which cannot be imported ({reason}); "
            f"install it: {install(extra)}"
        ) from None


def plotting(path: str | os.PathLike[str], error: type[AmxError] = AmxError) -> Any:
    """Import ``matplotlib.figure`` for a plot, before anything is computed for it.

    Raises
    ------
    AmxError
        When matplotlib is missing, the path ends in nothing that is drawn, or its folder is none.
    """
    if not Path(path).absolute().parent.is_dir():
        raise error(f"the folder of {path} does not exist; make it first")
    if Path(path).suffix not in PLOTS:
        raise error(f"{path} should end in {', '.join(PLOTS)}")
    return require("matplotlib.figure", "plot", "a plot", error)


def install(extra: str) -> str:
    """Return the command that installs an extra here."""
    try:
        distribution("amx-tvm")
        package = "amx-tvm"
    except PackageNotFoundError:
        package = str(Path(__file__).resolve().parents[1])
    return f'pip install "{package}[{extra}]"'
