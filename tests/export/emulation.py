"""An arm64 Debian root and the emulator for it, shared by the tests that run bundles there."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from export_tools import skip_without

from amx_tvm.errors import ArtifactError
from amx_tvm.exporting.wheels import find_wheel

SCRIPT = Path(__file__).parent / "arm64_root.sh"
PYTHON = "3.11"  # Debian 12's
LIMIT = 1200  # seconds; about 130 are needed where the machine does nothing else


def check_tools() -> None:
    """Skip where the emulator, the cross compiler or apt is missing."""
    skip_without("qemu-aarch64-static", "aarch64-linux-gnu-g++", "apt-get", "dpkg-deb")
    if platform.machine() != "x86_64":
        pytest.skip("the device is emulated on x86-64")


def make_root(folder: Path) -> Path:
    """Return the root with Python and NumPy; skip where it cannot be had, saying why."""
    check_tools()
    done = subprocess.run(
        ["sh", SCRIPT, folder], capture_output=True, text=True, check=False, timeout=LIMIT
    )
    if done.returncode:
        pytest.skip(f"apt has no arm64 packages here: {done.stderr.strip()[-200:]}")
    if not (folder / "usr" / "bin" / f"python{PYTHON}").exists():
        pytest.skip(f"this Debian's Python is not {PYTHON}")
    for package in ("apache-tvm", "apache-tvm-ffi", "typing-extensions"):
        try:
            find_wheel(package, "aarch64", PYTHON)
        except ArtifactError as error:
            pytest.skip(str(error))
    return folder


def command(root: Path, cpu: str, *arguments, log: Path | None = None) -> list[str]:
    """Return the command line that runs a program of the root on an emulated CPU."""
    words = ["qemu-aarch64-static", "-cpu", cpu, "-L", root, "-U", "PYTHONPATH"]
    words += ["-U", "LD_LIBRARY_PATH"]
    if log is not None:  # every block of instructions, when it is first executed
        words += ["-d", "in_asm", "-D", log]
    return [str(word) for word in [*words, *arguments]]


def emulate(root: Path, cpu: str, *arguments, log: Path | None = None):
    """Run a program of the root; return what it printed."""
    return subprocess.run(
        command(root, cpu, *arguments, log=log),
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )


def python(root: Path) -> Path:
    """Return the root's interpreter."""
    return root / "usr" / "bin" / f"python{PYTHON}"


def ids_of(output: str) -> list[int]:
    """Return the token ids that ``--print-ids`` printed."""
    line = next(line for line in output.splitlines() if line.startswith("ids:"))
    return [int(token) for token in line.removeprefix("ids:").split(",")]
