"""Build backend of this folder (PEP 517): packs it into a wheel, so that pip can install it.

    pip install --no-index ./runtime

Nothing is downloaded or compiled. tvm_ffi and TVM's runtime go into ``amx_tvm/bundled``, out of the
way of other packages; the extension module is the one for the Python that installs.
"""

import base64
import hashlib
import platform
import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
NAME = "amx_tvm_runtime"
OWN = ("pyproject.toml", Path(__file__).name)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Write the wheel into a folder and return its name."""
    check_python()
    version = re.search(r'__version__ = "(.+)"', (ROOT / "amx_tvm/version.py").read_text())[1]
    python = "cp{}{}".format(*sys.version_info[:2])
    tag = f"{python}-{python}-linux_{platform.machine()}"
    info = f"{NAME}-{version}.dist-info"
    files = {place(path): path.read_bytes() for path in sorted(ROOT.rglob("*")) if wanted(path)}
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: {NAME}\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    )
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {NAME.replace('_', '-')}\nVersion: {version}\n"
        "Summary: Runs models that amx-tvm compiled\nRequires-Dist: numpy>=1.23\n"
    ).encode()
    record = "".join(f"{name},{digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    wheel = f"{NAME}-{version}-{tag}.whl"
    with zipfile.ZipFile(Path(wheel_directory) / wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return wheel


def wanted(path):
    """Whether a file is part of the wheel: extension modules only for this Python."""
    if not path.is_file() or path.name in OWN or "__pycache__" in path.parts:
        return False
    extension = re.search(r"\.cpython-(\d+)-", path.name)
    return extension is None or extension[1] == "{}{}".format(*sys.version_info[:2])


def place(path):
    """Return where a file goes."""
    name = path.relative_to(ROOT).as_posix()
    return name if name.startswith("amx_tvm/") else f"amx_tvm/bundled/{name}"


def digest(data):
    """Return a file's hash as RECORD writes it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def check_python():
    """End with a message unless tvm_ffi is here for the Python that installs."""
    names = [path.name for path in (ROOT / "tvm_ffi").glob("core.cpython-*.so")]
    known = sorted(re.search(r"cpython-(\d)(\d+)", name).groups() for name in names)
    here = tuple(map(str, sys.version_info[:2]))
    if here not in known:
        raise SystemExit(
            f"error: this bundle has the runtime for Python {', '.join(map('.'.join, known))}, not "
            f"for {'.'.join(here)}; export it with `--python {'.'.join(here)}`"
        )
