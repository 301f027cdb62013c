"""A bundle on an emulated Raspberry Pi: only Debian's Python and NumPy, and what the bundle has."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from export_tools import skip_without

import amx_tvm

pytestmark = pytest.mark.slow
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    skip_without("qemu-aarch64-static", "aarch64-linux-gnu-g++", "apt-get", "dpkg-deb", "cmake")
    if platform.machine() != "x86_64":
        pytest.skip("the device is emulated on x86-64")
    folder = tmp_path_factory.mktemp("arm64") / "root"
    subprocess.run(["sh", Path(__file__).parent / "arm64_root.sh", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def bundle(tiny_artifact, tmp_path_factory):
    output = tmp_path_factory.mktemp("pi") / "bundle"
    amx_tvm.export(tiny_artifact, "raspberry-pi/4b-aarch64", output, pythons=("3.11",))
    return output


def emulate(root, cpu, *command):
    emulator = ["qemu-aarch64-static", "-cpu", cpu, "-L", root, "-U", "PYTHONPATH"]
    return subprocess.run(
        [*emulator, "-U", "LD_LIBRARY_PATH", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def ids_of(done):
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("ids:"))
    return [int(token) for token in line.removeprefix("ids:").split(",")]


@pytest.fixture(scope="module")
def expected(tiny_artifact):
    return amx_tvm.load(tiny_artifact.path).generate(PROMPT, 32).token_ids


REQUEST = ["--ids", ",".join(map(str, PROMPT)), "-n", "32", "--print-ids", "--threads", "1"]


def test_python_runtime(root, bundle, expected):
    python = root / "usr" / "bin" / "python3.11"
    done = emulate(root, "cortex-a72", python, bundle / "generate.py", *REQUEST)
    assert ids_of(done) == expected


def test_runner(root, bundle, expected):
    done = emulate(root, "cortex-a72", bundle / "bin" / "amx-run", bundle, *REQUEST)
    assert ids_of(done) == expected


def test_missing_instructions_are_an_error_and_no_crash(root, tiny_artifact, bundle, tmp_path):
    newer = tmp_path / "newer"
    amx_tvm.export(tiny_artifact, "raspberry-pi/5-aarch64", newer, runtimes=())
    done = emulate(root, "cortex-a72", bundle / "bin" / "amx-run", newer, *REQUEST)
    assert done.returncode == 2 and "needs the CPU features dotprod" in done.stderr
