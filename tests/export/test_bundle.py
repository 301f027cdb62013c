"""Bundles: the same bytes from the same input, and refusals that say why."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from export_tools import skip_without

import amx_tvm
from amx_tvm.artifact import cpu, verify_artifact
from amx_tvm.errors import ArtifactError, TargetError
from amx_tvm.exporting import archive, device_runtime

PI = "raspberry-pi/4b-aarch64"


def digests(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.mark.parametrize("target", ["x86-64-v3", pytest.param(PI, marks=pytest.mark.slow)])
def test_same_input_gives_the_same_bytes(target, tiny_artifact, tmp_path):
    """Two processes with other hash seeds and folders write the same archive, library included."""
    if target == PI:
        skip_without("aarch64-linux-gnu-g++")
    archives = []
    for name in ("one", "two"):
        output = tmp_path / name / "tiny.tar.gz"
        output.parent.mkdir()
        command = [sys.executable, "-m", "amx_tvm", "export", tiny_artifact.path]
        command += ["--target", target, "--runtime", "none", "-q", "-o", output]
        scratch = tmp_path / f"scratch-{name}"
        scratch.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": str(len(archives)), "TMPDIR": str(scratch)}
        subprocess.run(command, env=environment, cwd=scratch, check=True, capture_output=True)
        assert not list(scratch.iterdir())
        archives.append(output.read_bytes())
    assert archives[0] == archives[1]
    with tarfile.open(tmp_path / "one" / "tiny.tar.gz") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert {"tiny/lib.so", "tiny/manifest.json"} <= {m.name for m in members}


def test_parameters_are_not_quantized_again(tiny_artifact, tiny_bundle):
    assert tiny_bundle.manifest.parameters == tiny_artifact.manifest.parameters
    assert tiny_bundle.manifest.target.triple.startswith("aarch64")
    header = (Path(tiny_bundle.path) / "lib.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and header[18] == 183  # EM_AARCH64


def test_archive_depends_on_its_content_only(tiny_bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle.path, copy)  # other times
    for suffix in archive.SUFFIXES:
        if suffix.endswith("zst"):
            skip_without("zstd")
        one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
        archive.write_archive(Path(tiny_bundle.path), one, "tiny")
        archive.write_archive(copy, two, "tiny")
        assert one.read_bytes() == two.read_bytes()
    with tarfile.open(tmp_path / "one.tar.gz") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    assert digests(tmp_path / "out" / "tiny") == digests(tiny_bundle.path)


def test_archive_by_the_command_line(tiny_artifact, tmp_path, capsys, key_pair):
    """A signed bundle in one file, which runs as the artifact does once it is unpacked."""
    from amx_tvm.cli import main

    (private, public), output = key_pair("own"), tmp_path / "out" / "pi.tar"
    arguments = ["export", tiny_artifact.path, "--target", "x86-64-v2", "-o", str(output)]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--runtime", "none", "--sign", str(private)])
    assert caught.value.code == 0 and capsys.readouterr().out.strip() == str(output)
    assert [p.name for p in output.parent.iterdir()] == ["pi.tar"]
    with tarfile.open(output) as tar:
        readme = tar.extractfile("pi/README.md").read().decode()
        assert not [name for name in tar.getnames() if "tuning" in name]  # without records
        tar.extractall(tmp_path, filter="data")
    assert "tar -xf pi.tar && cd pi" in readme
    with pytest.raises(ArtifactError, match="exists"):
        amx_tvm.export(tiny_artifact, "x86-64-v2", output, runtimes=())
    assert (
        verify_artifact(tmp_path / "pi", require_signature=public).target.key
        == "llvm/x86-64/x86-64-v2"
    )
    ids = [5, 6, 7]
    ours, theirs = (amx_tvm.load(p).logits(ids) for p in (tmp_path / "pi", tiny_artifact.path))
    assert abs(ours - theirs).max() < 1e-4


def damage(folder, name, change):
    file = folder / name
    file.write_bytes(change(bytearray(file.read_bytes())))


def flip(data):
    data[len(data) // 2] ^= 1
    return data


@pytest.mark.parametrize("name", ["lib.so", "params/shard-00000.bin", "README.md", "manifest.json"])
def test_a_changed_byte_is_refused(tiny_bundle, tmp_path, monkeypatch, name):
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr("amx_tvm.artifact.verify.cpu_features", lambda: frozenset({"neon", "crc"}))
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, folder)
    verify_artifact(folder, "quick")
    damage(folder, name, flip)
    with pytest.raises(ArtifactError, match="damaged|digest|cannot be read"):
        verify_artifact(folder, "quick")


def test_a_truncated_file_is_refused(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr("amx_tvm.artifact.verify.cpu_features", lambda: frozenset())
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, folder)
    damage(folder, "params/shard-00000.bin", lambda data: data[:-1])
    with pytest.raises(ArtifactError, match="truncated"):
        verify_artifact(folder, False)


def test_another_cpu_is_refused(tiny_bundle, monkeypatch):
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    with pytest.raises(ArtifactError, match="aarch64-linux-gnu, this machine is x86_64"):
        amx_tvm.load(tiny_bundle.path)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr("amx_tvm.artifact.verify.cpu_features", lambda: frozenset({"crc"}))
    with pytest.raises(ArtifactError, match="needs the CPU features neon"):
        amx_tvm.load(tiny_bundle.path)


def test_an_older_runtime_refuses(tiny_bundle):
    with pytest.raises(ArtifactError, match=r"compiled with apache-tvm 0\.27\.0\.post1"):
        verify_artifact(tiny_bundle.path, False, ("0.26.0", "0.1.14.post1"))


def test_a_damaged_artifact_is_not_exported(tiny_artifact, tmp_path):
    folder = tmp_path / "artifact"
    shutil.copytree(tiny_artifact.path, folder)
    damage(folder, "params/shard-00000.bin", flip)
    with pytest.raises(ArtifactError, match="damaged"):
        amx_tvm.export(folder, "x86-64-v2", tmp_path / "out", runtimes=())
    assert not (tmp_path / "out").exists()


def test_wrong_requests(tiny_artifact, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with pytest.raises(ArtifactError, match="keeps its quantization"):
        amx_tvm.export(tiny_artifact, PI, output, quantization="int4")
    with pytest.raises(TargetError, match="runtime 'java' is unknown"):
        amx_tvm.export(tiny_artifact, PI, output, runtimes=("java",))
    with pytest.raises(TargetError, match="PyPI has no TVM runtime for riscv64"):
        amx_tvm.export(tiny_artifact, "riscv64-linux", output)
    with pytest.raises(TargetError, match="no TVM runtime for aarch64-linux-android24"):
        amx_tvm.export(tiny_artifact, "android-aarch64", output)
    monkeypatch.delenv("TVM_NDK_CC", raising=False)
    with pytest.raises(TargetError, match="NDK.*--no-link"):
        amx_tvm.export(tiny_artifact, "android-aarch64", output, runtimes=())
    assert not output.exists()


def test_python_runtime_is_what_the_device_imports(tiny_artifact, tmp_path, monkeypatch):
    """The folder holds every module of ours that loading imports, and none that compiles."""
    monkeypatch.setattr(device_runtime, "extract", lambda *_, **__: None)
    device_runtime.write_python(tmp_path, "aarch64", ["3.11"])
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import amx_tvm, json; "
        "amx_tvm.load(sys.argv[2]); import amx_tvm.runtime.chat; "
        "print(json.dumps([m.__file__ for n, m in sys.modules.items() if n[:7] == 'amx_tvm']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), tiny_artifact.path],
        capture_output=True,
        text=True,
        check=True,
    )
    import json

    loaded = json.loads(done.stdout)
    assert loaded and all(path.startswith(str(tmp_path)) for path in loaded)
    assert not (tmp_path / "amx_tvm" / "compiler").exists()
