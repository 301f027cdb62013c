"""What is damaged, incomplete or for another machine or runtime is refused: by both runtimes.

Each is run as on a device: the bundle's own `generate.py` with the bundle's own Python runtime, and
the bundle's own runner. The exit code is 2 and the reason is on standard error; a crash or a text
would be neither.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from export_tools import export_with_runtime, skip_without

from amx_tvm.artifact import SCHEMA
from amx_tvm.artifact import manifest as manifests

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(scope="module", params=["python", pytest.param("runner", marks=pytest.mark.slow)])
def bundle(request, tiny_artifact, tmp_path_factory):
    if platform.machine() != "x86_64":
        pytest.skip("the artifact is for x86-64")
    if request.param == "runner":
        skip_without("cmake", "g++")
    output = tmp_path_factory.mktemp("refusals") / "bundle"
    return export_with_runtime(
        tiny_artifact, "x86-64-v2", output, runtimes=(request.param,), pythons=(PYTHON,)
    )


@pytest.fixture
def copy(bundle, tmp_path):
    """A copy of the bundle to be spoilt."""
    shutil.copytree(bundle.path, tmp_path / "bundle")
    return tmp_path / "bundle"


def run(bundle, folder, *arguments):
    """Generate with the bundle's runtime from a folder."""
    runner = Path(bundle.path) / "bin" / "amx-run"
    if runner.is_file():
        command = [runner, folder]
    else:
        command = [sys.executable, folder / "generate.py"]
    return subprocess.run(
        [*command, "--ids", "5,6,7", "-n", "4", "--print-ids", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def check_refused(bundle, folder, *reasons):
    done = run(bundle, folder)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    for reason in reasons:
        assert reason in done.stderr
    assert "ids:" not in done.stdout


def rewrite(folder, change):
    """Change the manifest and make its digest right again."""
    file = folder / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    data["digest"] = manifests._digest(data)
    file.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def test_whole_it_runs(bundle, copy):
    done = run(bundle, copy)
    assert done.returncode == 0, done.stderr
    assert "ids:" in done.stdout
    rewrite(copy, lambda data: data["model"].update(note="a digest made by hand is accepted"))
    assert run(bundle, copy).returncode == 0


@pytest.mark.parametrize("name", ["lib.so", "params/shard-00000.bin"])
def test_truncated(bundle, copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    size = f"{name} has {len(data) - 1} bytes, the manifest says {len(data)} (truncated"
    check_refused(bundle, copy, size)
    (copy / name).unlink()
    check_refused(bundle, copy, f"{name} is missing")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lib.so", "lib.so is damaged"),
        ("params/shard-00000.bin", "shard-00000.bin is damaged between bytes 0 and"),
        ("tokenizer.json", "tokenizer.json is damaged"),
        ("README.md", "README.md is damaged"),
    ],
)
def test_one_changed_byte(bundle, copy, name, reason):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    check_refused(bundle, copy, reason)


def test_truncated_or_edited_manifest(bundle, copy):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    check_refused(bundle, copy, "manifest.json cannot be read")
    (copy / "manifest.json").write_text(text.replace('"offset": 0,', '"offset": 64,', 1))
    check_refused(bundle, copy, "does not match its own digest")
    (copy / "manifest.json").unlink()
    check_refused(bundle, copy, "is not an artifact: it has no manifest.json")


def test_older_runtime(bundle, copy):
    """A newer schema, even one whose other fields are unknown here."""

    def newer(data):
        data.update(schema=SCHEMA + 1, layers=[{"tensors": []}])
        del data["parameters"]

    rewrite(copy, newer)
    reader = "this runner" if (copy / "bin").is_dir() else "this version of amx_tvm"
    check_refused(bundle, copy, f"schema {SCHEMA + 1}, {reader} reads schema {SCHEMA}")


@pytest.mark.parametrize("key", ["tvm", "tvm_ffi"])
def test_another_tvm(bundle, copy, key):
    rewrite(copy, lambda data: data["versions"].update({key: "0.99.0"}))
    check_refused(bundle, copy, "0.99.0", "compile the model again")


def test_another_cpu(bundle, copy):
    rewrite(copy, lambda data: data["target"]["features"].append("avx1024"))
    check_refused(bundle, copy, "needs the CPU features avx1024")
    rewrite(copy, lambda data: data["target"].update(triple="aarch64-linux-gnu"))
    check_refused(bundle, copy, "compiled for aarch64-linux-gnu, this machine is x86_64")


def test_objects_that_are_not_linked(bundle, copy):
    rewrite(copy, lambda data: data["library"].update(bytes=0, sha256=""))
    check_refused(bundle, copy, "not linked yet; `python3 link.py COMPILER`")


def test_too_little_memory(bundle):
    done = run(bundle, Path(bundle.path), "--max-memory", "20M")
    assert done.returncode == 2 and "does not fit into 20 MiB" in done.stderr
