"""The ``runtime`` folder of a bundle: one entry of ``sys.path``, and the runner's libraries.

    runtime/amx_tvm/        this package without everything that compiles
    runtime/tvm_ffi/        the Python binding, one extension module a Python version
    runtime/tvm/lib/        libtvm_runtime.so, at the place where the wheel has it
    runtime/*.dist-info     so that versions are compared on the device as well

`import tvm` is not possible there and not needed. On the device: Python and NumPy.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import amx_tvm
from amx_tvm.exporting.wheels import PACKAGES, extract, find_wheel

FOLDER = "runtime"
# What of this package runs on a device; a test imports it there without the rest.
_MODULES = ("__init__.py", "errors.py", "version.py", "artifact", "runtime")
# tvm_ffi's headers, sources and build helpers; its `cpp` and `stub` are imported by the package.
_UNUSED = ("include/", "src/", "3rdparty/", "share/", "cython/", "lib/cmake/")
_LIBRARIES = ("libtvm_runtime.so",)
_CUDA_LIBRARIES = ("libtvm_runtime_cuda.so",)


def write_libraries(folder: Path, arch: str, device: str, wheels: Path | None = None) -> None:
    """Write the shared libraries that the runner and the Python runtime need."""
    names = _LIBRARIES + (_CUDA_LIBRARIES if device == "cuda" else ())
    wanted = {f"tvm/lib/{name}" for name in names}
    extract(find_wheel("apache-tvm", arch, "3.11", wheels), folder, wanted.__contains__)
    ffi = find_wheel("apache-tvm-ffi", arch, "3.11", wheels)
    extract(ffi, folder, "tvm_ffi/lib/libtvm_ffi.so".__eq__)


def write_python(
    folder: Path, arch: str, pythons: Sequence[str], wheels: Path | None = None
) -> None:
    """Write the Python runtime beside the libraries.

    Parameters
    ----------
    folder : Path
        The bundle's runtime folder.
    arch : str
        "aarch64" or "x86_64".
    pythons : sequence of str
        Python versions of the device, such as "3.11"; 1 MB each.
    wheels : Path, optional
        Where wheels are looked for first.
    """
    for python in pythons:
        wheel = find_wheel("apache-tvm-ffi", arch, python, wheels)
        extract(wheel, folder, _keep_ffi)
    info = f"apache_tvm-{PACKAGES['apache-tvm']}.dist-info/METADATA"
    extract(find_wheel("apache-tvm", arch, "3.11", wheels), folder, info.__eq__)
    extras = find_wheel("typing-extensions", arch, pythons[0], wheels)
    extract(extras, folder, "typing_extensions.py".__eq__)
    own = Path(amx_tvm.__file__).parent
    for name in _MODULES:
        if (own / name).is_dir():
            shutil.copytree(
                own / name,
                folder / "amx_tvm" / name,
                ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
            )
        else:
            (folder / "amx_tvm").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(own / name, folder / "amx_tvm" / name)


def _keep_ffi(name: str) -> bool:
    if name.startswith("tvm_ffi/"):
        return not name.removeprefix("tvm_ffi/").startswith(_UNUSED)
    return name.endswith(".dist-info/METADATA")
