"""A bundle's runtime, installed by pip without a network, generates without the compiler."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
from export_tools import export_with_runtime, machine_code

import amx_tvm
from amx_tvm.exporting.stub_library import stub_library

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PROMPT = [5, 6, 7, 8]
SCRIPT = """
import json, sys
import amx_tvm
engine = amx_tvm.load(sys.argv[1], threads=1)
ids = engine.generate([5, 6, 7, 8], 16).token_ids
names = ("tvm", "torch", "relax_passes", "tuning", "tokenizers", "amx_tvm.compiler")
heavy = [name for name in names if getattr(sys.modules.get(name), "__file__", None)]
places = {name: sys.modules[name].__file__ for name in ("amx_tvm", "tvm_ffi", "numpy")}
maps = [line.split()[-1] for line in open("/proc/self/maps") if "libtvm" in line]
print(json.dumps([ids, heavy, places, sorted(set(maps))]))
"""


@pytest.fixture(scope="module")
def bundle(tiny_artifact, tmp_path_factory):
    if platform.machine() != "x86_64":
        pytest.skip("the artifact is for x86-64")
    output = tmp_path_factory.mktemp("install") / "bundle"
    return export_with_runtime(
        tiny_artifact, "x86-64-v2", output, runtimes=("python",), pythons=(PYTHON,)
    )


@pytest.fixture(scope="module")
def installed(bundle, tmp_path_factory):
    """A folder into which pip has installed the runtime, with NumPy beside it and nothing else."""
    place = tmp_path_factory.mktemp("device") / "site"
    runtime = Path(bundle.path) / "runtime"
    before = sorted(str(path) for path in runtime.rglob("*"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", place, runtime],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(str(path) for path in runtime.rglob("*")) == before
    for name in ("numpy", "numpy.libs"):
        source = Path(numpy.__file__).parents[1] / name
        if source.is_dir():
            (place / name).symlink_to(source)
    return place


def run(place, *arguments):
    """Run Python with the standard library and one folder."""
    start = f"import sys; sys.path.append({str(place)!r}); sys.dont_write_bytecode = True\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_generates_without_the_compiler(bundle, installed, tiny_artifact):
    done = run(installed, bundle.path)
    assert done.returncode == 0, done.stderr
    ids, heavy, places, maps = json.loads(done.stdout)
    assert ids == amx_tvm.load(tiny_artifact.path).generate(PROMPT, 16).token_ids
    assert heavy == []
    assert all(file.startswith(str(installed)) for file in places.values())
    inside = str(installed / "amx_tvm" / "bundled")
    assert places["tvm_ffi"].startswith(inside)
    assert {Path(file).name for file in maps if file.startswith(inside)} == {
        "libtvm_ffi.so",
        "libtvm_ffi_testing.so",
        "libtvm_runtime.so",
    }
    assert all(file.startswith((inside, bundle.path)) for file in maps)


def test_installs_as_one_package(installed):
    """Nothing of it lies where other packages have their own tvm_ffi or typing_extensions."""
    own = {path.name for path in installed.iterdir()} - {"numpy", "numpy.libs"}
    assert {name.partition("-")[0] for name in own} == {"amx_tvm", "amx_tvm_runtime"}
    record = next(installed.glob("*.dist-info")) / "RECORD"
    assert f"amx_tvm/bundled/tvm_ffi/core.cpython-{PYTHON.replace('.', '')}" in record.read_text()


def test_about_7_mb(bundle):
    """libtvm_runtime 3.4 MB, libtvm_ffi 2.5, the extension module 1.1, Python 0.9; aarch64: 7.2."""
    assert bundle.runtime_bytes < 8.0e6


def build(bundle, folder, version=None):
    """Run the build backend as pip does."""
    fake = f"sys.version_info = (*{version}, 0, 'final', 0); " if version else ""
    script = (
        f"import sys; sys.path.insert(0, {bundle.path + '/runtime'!r}); "
        f"import wheel_of_this_folder as w; {fake}w.build_wheel({str(folder)!r})"
    )
    return subprocess.run(
        [sys.executable, "-B", "-c", script], capture_output=True, text=True, check=False
    )


def test_wheels_are_the_same_and_for_this_python(bundle, tmp_path):
    wheels = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert build(bundle, tmp_path / name).returncode == 0
        wheels += (tmp_path / name).glob("*.whl")
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
    tag = "cp" + PYTHON.replace(".", "")
    assert wheels[0].name.endswith(f"-{tag}-{tag}-linux_{platform.machine()}.whl")
    with zipfile.ZipFile(wheels[0]) as archive:
        listed = archive.read(next(n for n in archive.namelist() if n.endswith("RECORD"))).decode()
        assert {line.split(",")[0] for line in listed.splitlines()} == set(archive.namelist())
    done = build(bundle, tmp_path, (3, 7))
    assert done.returncode == 1
    assert f"for Python {PYTHON}, not for 3.7; export it with `--python 3.7`" in done.stderr


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_stub_library(arch, tmp_path):
    data = stub_library(arch, "libnames.so", ["one", "two", "three"])
    assert machine_code(data) == {"x86_64": 62, "aarch64": 183}[arch]
    if arch == platform.machine():
        file = tmp_path / "libnames.so"
        file.write_bytes(data)
        library = ctypes.CDLL(str(file))
        assert [library.one(), library.two(), library.three()] == [0, 0, 0]
        with pytest.raises(AttributeError, match="undefined symbol"):
            library.four  # noqa: B018
