"""The ``runtime`` folder of a bundle: what a device needs, to be used in place or installed by pip.

    runtime/amx_tvm/        this package without everything that compiles
    runtime/tvm_ffi/        the Python binding, one extension module a Python version
    runtime/tvm/lib/        libtvm_runtime.so, at the place where the wheel has it
    runtime/*.dist-info     so that versions are compared on the device as well
    runtime/pyproject.toml  and its build backend: `pip install --no-index ./runtime`

`import tvm` is not possible there and not needed. On the device: Python and NumPy.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import amx_tvm
from amx_tvm.exporting.stub_library import stub_library
from amx_tvm.exporting.wheels import PACKAGES, extract

FOLDER = "runtime"
_TEMPLATES = Path(__file__).parent / "templates"
# What of this package runs on a device; a test imports it there without the rest.
_FILES = (
    "__init__.py",
    "embedding.py",
    "errors.py",
    "extras.py",
    "schema.py",
    "shadowing.py",
    "without_torch.py",
    "strict_json.py",
    "version.py",
)
_MODULES = (*_FILES, "artifact", "images", "runtime", "templating")
# tvm_ffi's headers, sources and tools: nothing that `import tvm_ffi` reads.
_UNUSED = (
    *("include/", "src/", "3rdparty/", "share/", "cython/", "lib/", "stub/", "testing/"),
    *("utils/embed_cubin.py", "utils/_build_optional_torch_c_dlpack.py"),  # these want the headers
)
_LIBRARIES = ("libtvm_runtime.so",)
_CUDA_LIBRARIES = ("libtvm_runtime_cuda.so",)
# The extension module calls one function of it, which does nothing (tvm_ffi 0.1.14).
_TESTING, _TESTING_FUNCTION = "libtvm_ffi_testing.so", "TVMFFITestingDummyTarget"


def write_libraries(folder: Path, arch: str, device: str, wheels: Path | None = None) -> None:
    """Write the shared libraries that the runner and the Python runtime need."""
    names = _LIBRARIES + (_CUDA_LIBRARIES if device == "cuda" else ())
    wanted = {f"tvm/lib/{name}" for name in names}
    extract("apache-tvm", arch, folder, wanted.__contains__, wheels=wheels)
    extract("apache-tvm-ffi", arch, folder, "tvm_ffi/lib/libtvm_ffi.so".__eq__, wheels=wheels)


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
        extract("apache-tvm-ffi", arch, folder, _keep_ffi, python, wheels)
    library = stub_library(arch, _TESTING, [_TESTING_FUNCTION])
    (folder / "tvm_ffi" / "lib").mkdir(parents=True, exist_ok=True)
    (folder / "tvm_ffi" / "lib" / _TESTING).write_bytes(library)
    info = f"apache_tvm-{PACKAGES['apache-tvm']}.dist-info/"
    extract("apache-tvm", arch, folder, lambda n: n.startswith(info) and _is_info(n), wheels=wheels)
    extract("typing-extensions", arch, folder, "typing_extensions.py".__eq__, wheels=wheels)
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
    for name in ("pyproject.toml", "wheel_of_this_folder.py"):
        shutil.copyfile(_TEMPLATES / name, folder / name)


def _keep_ffi(name: str) -> bool:
    if name.startswith("tvm_ffi/"):
        inside = name.removeprefix("tvm_ffi/")
        return inside.endswith((".py", ".so")) and not inside.startswith(_UNUSED)
    return _is_info(name)


def _is_info(name: str) -> bool:
    """Whether a file has a package's version or its license."""
    return ".dist-info/" in name and name.endswith(("METADATA", "LICENSE", "NOTICE"))
