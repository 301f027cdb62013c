"""Versions of this package and of what it is built on, and the guard against one that crashes."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from amx_tvm.errors import AmxError

__version__ = "0.1.0"
TVM = "0.27.0.post1"
TVM_FFI = "0.1.14.post1"
BUNDLED = Path(__file__).parent / "bundled"  # a device's tvm_ffi and libtvm_runtime, if installed


def use_bundled() -> None:
    """Prefer the tvm_ffi that was installed with this package, where a bundle's runtime was."""
    if BUNDLED.is_dir() and str(BUNDLED) not in sys.path:
        sys.path.insert(0, str(BUNDLED))


def versions() -> dict[str, str]:
    """Return the versions that an artifact records."""
    return {"amx_tvm": __version__, "tvm": _installed("apache-tvm"), "tvm_ffi": ffi_version()}


def ffi_version() -> str:
    """Return the installed version of apache-tvm-ffi."""
    return _installed("apache-tvm-ffi")


def guard() -> None:
    """Refuse to start on a combination that is known to crash the process.

    TVM 0.27.0.post1 with apache-tvm-ffi 0.1.15 and later ends in a segmentation fault as soon as an
    IR expression is serialized, and pip picks that version by itself; a crash cannot be caught, so
    the version is checked before TVM is imported.

    Raises
    ------
    AmxError
        With the command that installs the right version.
    """
    found = ffi_version()
    if found and found != TVM_FFI:
        raise AmxError(
            f"apache-tvm-ffi {found} is installed; apache-tvm {TVM} crashes with other versions "
            f"than {TVM_FFI}: run `pip install apache-tvm-ffi=={TVM_FFI}`"
        )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
