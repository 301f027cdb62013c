"""Running an artifact needs none of the compiler: checked in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import amx_tvm.runtime
from amx_tvm.errors import ArtifactError, TargetError
from amx_tvm.runtime import library

SCRIPT = """
import json, os, sys, time
import amx_tvm.runtime
start = time.process_time()
engine = amx_tvm.runtime.load(sys.argv[1], threads=1)
seconds = time.process_time() - start  # of work: others may hold the cores
result = engine.generate("the cat", max_new_tokens=4, ignore_eos=True)
heavy = ("tvm", "torch", "relax_passes", "tuning", "transformers", "amx_tvm.compiler",
         "amx_tvm.frontends", "amx_tvm.formats", "typer", "rich")
print(json.dumps({
    "modules": [name for name in heavy if name in sys.modules],
    "maps": [line.split()[-1] for line in open("/proc/self/maps") if "tvm" in line],
    "seconds": seconds,
    "tokens": result.token_ids,
    "threads": os.environ["TVM_NUM_THREADS"],
}))
"""


@pytest.fixture(scope="module")
def report(artifact):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(artifact)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_neither_compiler_nor_torch_is_imported(report):
    assert report["modules"] == []
    assert not [path for path in report["maps"] if "libtvm_compiler" in path]
    assert [path for path in report["maps"] if "libtvm_runtime.so" in path]


def test_a_fresh_process_generates_the_same(report, engine):
    result = engine.generate("the cat", max_new_tokens=4, ignore_eos=True)
    assert report["tokens"] == result.token_ids
    assert report["threads"] == "1"
    assert report["seconds"] < 5


def test_artifact_reader_needs_only_numpy(artifact):
    script = (
        "import sys; from amx_tvm.artifact import *; m = verify_artifact(sys.argv[1], 'full');"
        "open_parameters(sys.argv[1], m.parameters);"
        "import json; print(json.dumps([n for n in sys.modules if n.split('.')[0] in"
        " ('tvm', 'tvm_ffi', 'torch', 'tokenizers', 'relax_passes')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(artifact)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []


def test_runtime_library_by_environment(monkeypatch, tmp_path):
    found = library.find_library()
    (tmp_path / "libtvm_runtime.so").symlink_to(found)
    monkeypatch.setenv("AMX_TVM_RUNTIME", str(tmp_path))
    assert library.find_library() == found.resolve()
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    assert library.find_library() == found.resolve()
    monkeypatch.setenv("AMX_TVM_RUNTIME", str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match="AMX_TVM_RUNTIME"):
        library.find_library()


def test_threads(monkeypatch):
    monkeypatch.setattr(library, "usable_cores", lambda: 4)
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert library.set_threads(None) == 3
    assert library.set_threads(2) == 2
    monkeypatch.setenv("TVM_NUM_THREADS", "")
    assert library.set_threads(None) == library.physical_cores() >= 1
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(TargetError, match=f"threads is {wrong!r}"):
            library.set_threads(wrong)
    with pytest.warns(RuntimeWarning, match="999 threads on 4 cores: 4 are used"):
        assert library.set_threads(999) == 4


def test_versions_other_than_the_installed_are_refused(artifact, monkeypatch):
    monkeypatch.setattr("amx_tvm.runtime.loading.installed_versions", lambda: ("0.26.0", "0.1"))
    with pytest.raises(ArtifactError, match=r"installed is 0\.26\.0"):
        amx_tvm.runtime.load(artifact)
