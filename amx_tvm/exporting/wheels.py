"""The device's TVM: files out of the wheels that PyPI has for its architecture.

A wheel is looked for in the folder that the user gives, then in the cache, then downloaded by pip.
For this machine's own architecture the installed package serves as well, file by file with the
SHA-256 that its wheel stated, so that the bytes are the same. Versions are pinned: tvm_ffi must be
the one that TVM's runtime was built against.
"""

from __future__ import annotations

import base64
import hashlib
import platform
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from amx_tvm.errors import ArtifactError
from amx_tvm.schema import INSIDE
from amx_tvm.user_cache import cache_folder
from amx_tvm.version import TVM, TVM_FFI

PACKAGES = {
    "apache-tvm": TVM,
    "apache-tvm-ffi": TVM_FFI,
    "typing-extensions": "4.16.0",
}
PYTHONS = ("3.11", "3.12", "3.13")
ANY = PYTHONS[0]  # whose wheel is taken for files that are the same in all
_UNPACKED_BYTES = 2 << 30
_GLIBC = ("2_28", "2_27", "2_17")  # the manylinux levels of these wheels


def find_wheel(package: str, arch: str, python: str, folder: Path | None = None) -> Path:
    """Return the path of a wheel, downloading it into the cache where it is nowhere yet.

    Parameters
    ----------
    package : str
        A key of ``PACKAGES``.
    arch : str
        "aarch64" or "x86_64".
    python : str
        Python version of the device, such as "3.11".
    folder : Path, optional
        Where the user keeps wheels; nothing is downloaded if it has the right one.

    Raises
    ------
    ArtifactError
        When it cannot be had, with pip's reason.
    """
    cache = cache_folder("wheels")
    for place in (folder, cache):
        found = _look(place, package, arch, python) if place is not None else None
        if found is not None:
            return found
    cache.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux_{level}_{arch}" for level in _GLIBC]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        f"--python-version={python}", *platforms, f"--dest={cache}",
        f"{package}=={PACKAGES[package]}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = _look(cache, package, arch, python)
    if found is None:
        reason = [line for line in done.stderr.splitlines() if "ERROR" in line]
        raise ArtifactError(
            f"the wheel of {package} {PACKAGES[package]} for {arch} and Python {python} is not "
            f"here and pip cannot download it ({(reason or ['no reason given'])[0]}); put it into "
            "a folder and give that as `--wheels`, or leave the runtimes out with `--runtime none`"
        )
    return found


def _look(folder: Path, package: str, arch: str, python: str) -> Path | None:
    stem = f"{package.replace('-', '_')}-{PACKAGES[package]}-"
    tag = f"cp{python.replace('.', '')}-"
    for file in sorted(folder.glob(f"{stem}*.whl")):
        rest = file.name.removeprefix(stem)
        if rest.startswith(("py3-none-", tag)) and rest.endswith((f"{arch}.whl", "any.whl")):
            return file
    return None


def extract(
    package: str,
    arch: str,
    folder: Path,
    keep: Callable[[str], bool],
    python: str | None = None,
    wheels: Path | None = None,
) -> None:
    """Write those files of a package that ``keep`` answers for; none outside ``folder``.

    Parameters
    ----------
    package : str
        A key of ``PACKAGES``.
    arch : str
        "aarch64" or "x86_64".
    folder : Path
        Where the files go, under their names in the wheel.
    keep : callable
        Whether a name in the wheel is wanted.
    python : str, optional
        Python version of the device; left out where the files do not depend on it.
    wheels : Path, optional
        Where the user keeps wheels.

    Raises
    ------
    ArtifactError
        When the package cannot be had, or its wheel is damaged.
    """
    found = _installed(package, arch, keep, python) if wheels is None else None
    for name, content in found or _zipped(find_wheel(package, arch, python or ANY, wheels), keep):
        if not INSIDE(name):
            continue  # a name that leads out of the folder is no file of these packages
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _zipped(wheel: Path, keep: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir() and keep(e.filename)]
            if sum(entry.file_size for entry in entries) > _UNPACKED_BYTES:
                raise ArtifactError(
                    f"{wheel} unpacks to more than {_UNPACKED_BYTES >> 20} MiB, which these wheels "
                    "never do; get it from PyPI again"
                )
            for entry in sorted(entries, key=lambda e: e.filename):
                yield entry.filename, archive.read(entry)
    except ArtifactError:
        raise
    except Exception as error:  # of the zip's reader, or of one of its four decompressors
        raise ArtifactError(
            f"{wheel} cannot be read as a wheel: {error}; get it from PyPI again"
        ) from None


def _installed(
    package: str, arch: str, keep: Callable[[str], bool], python: str | None
) -> list[tuple[str, bytes]]:
    """Return the files of the package that runs here, or none if it is not the one wanted."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if sys.platform != "linux" or arch != platform.machine() or python not in (None, here):
        return []
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return []
    if distribution.version != PACKAGES[package]:
        return []
    found = []
    for file in distribution.files or []:
        name = file.as_posix()
        if file.hash is None or not keep(name):
            continue  # pip's own additions have no hash, or names that nobody asks for
        try:
            content = Path(str(file.locate())).read_bytes()
        except OSError:
            return []
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
        if file.hash.mode != "sha256" or file.hash.value != digest.decode():
            return []
        found.append((name, content))
    return sorted(found)
