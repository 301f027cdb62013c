"""Bundles for targets whose linker is not here: objects, a script that links them, refusals."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from export_tools import machine_code, skip_without

import amx_tvm
from amx_tvm.artifact import Manifest, cpu, verify_artifact
from amx_tvm.errors import ArtifactError, TargetError
from relax_passes.machine_code import PARTS

PROMPT = [5, 6, 7, 8]


def link(bundle, *arguments):
    """Run the bundle's script."""
    command = [sys.executable, "-I", f"{bundle.path}/link.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def export(artifact, target, folder):
    output = folder / "bundle"
    bundle = amx_tvm.export(artifact, target, output, runtimes=(), link=False)
    assert not (output / "lib.so").exists() and not bundle.manifest.linked
    return bundle


def test_linked_later_it_runs(tiny_artifact, tmp_path):
    skip_without("g++")
    if platform.machine() != "x86_64":
        pytest.skip("the artifact is for x86-64")
    bundle = export(tiny_artifact, "x86-64-v2", tmp_path)
    assert "python3 link.py x86_64-linux-gnu-g++" in (tmp_path / "bundle/README.md").read_text()
    with pytest.raises(ArtifactError, match=r"not linked yet; `python3 link\.py COMPILER`"):
        amx_tvm.load(bundle.path)
    with pytest.raises(ArtifactError, match="not linked yet"):
        amx_tvm.load(bundle.path, verify=False)
    done = link(bundle, "g++")
    assert done.returncode == 0, done.stderr
    verify_artifact(bundle.path, "full")
    found = amx_tvm.load(bundle.path).generate(PROMPT, 16).token_ids
    assert found == amx_tvm.load(tiny_artifact.path).generate(PROMPT, 16).token_ids


def test_same_library_as_linked_here(tiny_artifact, tiny_bundle, tmp_path):
    bundle = export(tiny_artifact, "raspberry-pi/4b-aarch64", tmp_path)
    done = link(bundle, "aarch64-linux-gnu-g++")
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(bundle.path)  # its digest included
    assert manifest.library == tiny_bundle.manifest.library
    assert manifest.parameters == tiny_bundle.manifest.parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "machine", "compiler"),
    [
        ("android-aarch64", 183, "aarch64-linux-android24-clang++"),
        ("riscv64-linux", 243, "riscv64-linux-gnu-g++"),
    ],
)
def test_targets_without_a_linker_here(
    tiny_artifact, tmp_path, monkeypatch, target, machine, compiler
):
    bundle = export(tiny_artifact, target, tmp_path)
    objects = sorted((Path(bundle.path) / "objects").iterdir())
    assert {file.name for file in objects} == {*(f"lib{i}.o" for i in range(PARTS)), "devc.o"}
    assert {machine_code(file.read_bytes()) for file in objects} == {machine}
    readme = (Path(bundle.path) / "README.md").read_text()
    assert f"{compiler}\n" in readme and "Until then nothing loads this folder" in readme
    arch = bundle.manifest.target.triple.split("-")[0]
    monkeypatch.setattr(cpu.platform, "machine", lambda: arch)
    monkeypatch.setattr("amx_tvm.artifact.verify.cpu_features", frozenset)
    with pytest.raises(ArtifactError, match=f"{bundle.manifest.target.triple} that are not linked"):
        verify_artifact(bundle.path)
    if shutil.which(compiler):
        done = link(bundle, compiler)
        assert done.returncode == 0, done.stderr
        assert machine_code((Path(bundle.path) / "lib.so").read_bytes()) == machine
        verify_artifact(bundle.path, "full")


def test_nothing_is_signed_before_it_is_linked(tiny_artifact, tmp_path, key_pair):
    """link.py changes the manifest, so that the signature would be of another one."""
    private, _ = key_pair("own")
    output = tmp_path / "out" / "bundle"
    with pytest.raises(ArtifactError, match="without --no-link, or without --sign"):
        amx_tvm.export(tiny_artifact, "x86-64-v2", output, runtimes=(), link=False, sign=private)
    assert not output.parent.exists()


def test_wrong_requests(tiny_artifact, tmp_path):
    with pytest.raises(TargetError, match="serves one target"):
        amx_tvm.export(
            tiny_artifact, "x86-64-v2,x86-64-v3", tmp_path / "two", runtimes=(), link=False
        )
    assert not list(tmp_path.iterdir())
    bundle = export(tiny_artifact, "x86-64-v2", tmp_path)
    before = (Path(bundle.path) / "manifest.json").read_bytes()
    assert "link.py COMPILER" in link(bundle).stderr
    done = link(bundle, "no-such-compiler")
    assert done.returncode == 1 and "no-such-compiler cannot be run" in done.stderr
    file = Path(bundle.path) / "objects" / "lib0.o"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = link(bundle, "g++")
    assert done.returncode == 1 and "objects/lib0.o is damaged" in done.stderr
    assert (Path(bundle.path) / "manifest.json").read_bytes() == before
