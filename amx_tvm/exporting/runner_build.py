"""Build the C++ runner for a device, once, and keep the binary in the cache.

The sources are ``runner/`` of the repository, to which a link lies here; a wheel has a copy. For
another architecture Debian's cross compiler is used, with the static libraries that
``runner/sysroot.sh`` fetches.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from amx_tvm.artifact.publication import Publication
from amx_tvm.errors import ArtifactError
from amx_tvm.exporting.wheels import extract
from amx_tvm.scratch import scratch
from amx_tvm.user_cache import cache_folder

SOURCES = (Path(__file__).parent / "runner").resolve()
DEBIAN_ARCH = {"aarch64": "arm64", "x86_64": "amd64", "riscv64": "riscv64"}
_NATIVE_PACKAGES = "cmake g++ libpcre2-dev libutf8proc-dev nlohmann-json3-dev"


def build_runner(arch: str, wheels: Path | None = None) -> Path:
    """Return the path of an ``amx-run`` for ``arch``.

    Parameters
    ----------
    arch : str
        "aarch64" or "x86_64".
    wheels : Path, optional
        Where the wheel of tvm_ffi is looked for first; its library is linked.

    Raises
    ------
    ArtifactError
        When sources, compiler or libraries are missing, with what to install.
    """
    if not (SOURCES / "CMakeLists.txt").is_file():
        raise ArtifactError(
            f"the sources of the C++ runner are not at {SOURCES}; install amx_tvm again, or export "
            "with `--runtime python`"
        )
    cross = arch != platform.machine()
    compiler = f"{arch}-linux-gnu-g++" if cross else "g++"
    for tool in ("cmake", compiler):
        if shutil.which(tool) is None:
            packages = (
                f"g++-{arch.replace('_', '-')}-linux-gnu cmake" if cross else _NATIVE_PACKAGES
            )
            raise ArtifactError(
                f"building the runner needs {tool}, which is not installed (Debian: apt-get "
                f"install {packages}); install it, or export with `--runtime python`"
            )
    folder = cache_folder("runner") / f"{arch}-{_digest(compiler)}"
    binary = folder / "amx-run"
    if binary.is_file():
        return binary
    with scratch("amx-run-") as place:
        parts = ("tvm_ffi/include/", "tvm_ffi/lib/")
        extract("apache-tvm-ffi", arch, place, lambda n: n.startswith(parts), wheels=wheels)
        options = [f"-DTVM_FFI_ROOT={place / 'tvm_ffi'}"]
        if cross:
            prefix = place / "prefix"
            _run(["sh", str(SOURCES / "sysroot.sh"), DEBIAN_ARCH.get(arch, arch), str(prefix)])
            toolchain = SOURCES / "cmake" / "cross.cmake"
            options += [
                f"-DCMAKE_TOOLCHAIN_FILE={toolchain}",
                f"-DAMX_ARCH={arch}",
                f"-DAMX_PREFIX={prefix}",
            ]
        build = place / "build"
        _run(["cmake", "-S", str(SOURCES), "-B", str(build), *options])
        _run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)])
        with Publication(binary) as new:
            shutil.copy2(build / "amx-run", new.path)
            new.publish(replace=True)
    return binary


def _digest(compiler: str) -> str:
    """Identity of sources, compiler and libraries' versions that a binary is made from."""
    digest = hashlib.sha256()
    for file in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        digest.update(file.relative_to(SOURCES).as_posix().encode() + b"\0" + file.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False)
    digest.update(version.stdout)
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [x for x in (done.stderr + done.stdout).splitlines() if "rror" in x]
        raise ArtifactError(
            f"the runner could not be built: `{Path(command[0]).name}` says "
            f"{' / '.join(lines[:3]) or done.stderr[-300:]}; it needs (Debian) "
            f"{_NATIVE_PACKAGES}, or export with `--runtime python`"
        )
