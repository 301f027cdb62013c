"""What cannot work is found before any weight is touched; a full disk ends no process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from types import SimpleNamespace

import pytest

import amx_tvm
from amx_tvm.artifact.publication import Publication
from amx_tvm.compiler.checkpoint import quantize_checkpoint
from amx_tvm.compiler.lowered import describe
from amx_tvm.compiler.objects import object_folder
from amx_tvm.errors import AmxError, ArtifactError, ModelError, TargetError
from amx_tvm.linker import linker
from amx_tvm.models import families
from amx_tvm.targets.cuda import toolchain


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def no_program(monkeypatch, folder):
    monkeypatch.setenv("PATH", str(folder))


def wrong_variable(monkeypatch, folder):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")


def no_binutils(monkeypatch, folder):
    text = "echo \"collect2: fatal error: cannot find 'ld'\" >&2; exit 1"
    monkeypatch.setenv("CXX", str(program(folder / "g++", text)))


def not_executable(monkeypatch, folder):
    file = folder / "g++"
    file.write_bytes(b"\x7fELF of another machine")
    file.chmod(0o755)
    monkeypatch.setenv("CXX", str(file))


def full_for_the_linker(monkeypatch, folder):
    text = "echo 'ld: final link failed: No space left on device' >&2; exit 1"
    monkeypatch.setenv("CXX", f"{program(folder / 'g++', text)} -O2")


LINKERS = {
    no_program: "none is installed.*apt-get install g",
    wrong_variable: "CXX is 'no-such-compiler -O2'",
    no_binutils: "cannot link a shared library: .*cannot find 'ld'",
    not_executable: "cannot be run: Exec format error",
    full_for_the_linker: "no space left for .* free under",
}


def check(model, tmp_path, match):
    """compile() ends with one line, before its first stage, and leaves nothing."""
    stages, output = [], tmp_path / "out" / "artifact"
    with pytest.raises(AmxError, match=match) as caught:
        amx_tvm.compile(model, output=output, progress=lambda *stage: stages.append(stage))
    assert "\n" not in str(caught.value) and stages == []
    assert not output.parent.exists() or os.listdir(output.parent) == []


@pytest.mark.parametrize("fault", LINKERS, ids=lambda f: f.__name__)
def test_linkers(model, tmp_path, monkeypatch, fault):
    for variable in ("CXX", "CC"):
        monkeypatch.delenv(variable, raising=False)
    fault(monkeypatch, tmp_path)
    check(model, tmp_path, LINKERS[fault])


def test_a_compiler_with_its_options_links(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "env LANG=C cc -O1")
    linker("").check(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("target", "words"),
    [("raspberry-pi/4b-aarch64", "aarch64-linux-gnu-g"), ("android-aarch64", "TVM_NDK_CC")],
)
def test_cross_compilers(model, tmp_path, monkeypatch, target, words):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TVM_NDK_CC", raising=False)
    with pytest.raises(TargetError, match=words):
        amx_tvm.compile(model, target, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no tokenizer.json"),
        ("{", "cannot be read as JSON"),
        (json.dumps({"model": {"type": "Mystery"}}), "no tokenizer that can be read"),
    ],
    ids=["missing", "cut", "unknown kind"],
)
def test_tokenizers(model, tmp_path, content, words):
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "tokenizer.json").unlink()
    if content is not None:
        (copy / "tokenizer.json").write_text(content)
    check(copy, tmp_path, words)


@pytest.mark.parametrize("ids", [{"bos_token_id": 300}, {"eos_token_id": [0, 4096]}], ids=str)
def test_special_ids(model, tmp_path, ids):
    copy = shutil.copytree(model, tmp_path / "model")
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **ids}))
    stages = []
    with pytest.raises(ModelError, match=r"(300|4096).*vocabulary of 300"):
        amx_tvm.compile(
            copy, output=tmp_path / "out", progress=lambda *stage: stages.append(stage[0])
        )
    assert set(stages) <= {"fit", "lower"} and os.listdir(tmp_path) == ["model"]


@pytest.fixture
def crowded(monkeypatch):
    """Only 4 kB are free wherever one asks."""
    usage = shutil.disk_usage("/")._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_a_disk_that_is_too_small(model, tmp_path, crowded):
    stages = []
    with pytest.raises(ArtifactError, match=r"needs about \d+ kB, and 4 kB are free"):
        amx_tvm.compile(
            model, output=tmp_path / "out", progress=lambda *stage: stages.append(stage[0])
        )
    assert stages == [] and os.listdir(tmp_path) == []
    with pytest.raises(ArtifactError, match=r"needs \d+ kB, and 4 kB are free"):
        quantize_checkpoint(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_no_scratch_directory_is_needed(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/null/nothing")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/nothing")
    made = amx_tvm.compile(model, quantization="none", output=tmp_path / "out")
    assert amx_tvm.load(made.path, threads=1).generate([5, 6], 2).token_ids


def test_objects_are_in_memory(tmp_path):
    """More is written than the disk has; what meets its end is the copy, as an OSError."""
    with object_folder(tmp_path) as folder:
        with open(f"{folder}/lib0.o", "wb") as file:
            file.write(b"x" * 1000)
        assert os.stat(f"{folder}/lib0.o").st_dev != os.stat(tmp_path).st_dev
        with open(f"{folder}/lib0.o", "rb") as file:
            assert len(file.read()) == 1000
    assert os.listdir(tmp_path) == []


def test_errors_of_a_full_disk_are_one_line(tmp_path):
    with pytest.raises(ArtifactError, match="no space left"), Publication(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("vocab", "kept"), [(272, None), (50257, 50256)])
def test_ids_that_nobody_set_end_nothing(vocab, kept):
    family = next(one for one in families() if one.name == "gpt2")
    ids = {"bos_token_id": 50256, "eos_token_id": [50256]}  # transformers writes them for any GPT-2
    source = SimpleNamespace(name="m", config={}, generation_config=ids)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "context_length": 64}
    model = describe(source, SimpleNamespace(vocab_size=vocab, **sizes), family)
    assert model["bos_token_id"] == kept
    assert model["eos_token_ids"] == ([] if kept is None else [kept])


def test_no_compiler_for_gpus(model, tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"CUDA 13's nvcc is needed.*pip install .*\[cuda\]"):
        amx_tvm.compile(model, target="cuda:sm_90a", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What `nvidia-cuda-nvcc` alone is: its cuda_fp16.h includes a header of another package.
NO_HEADERS = """case "$*" in *-E*) echo "cuda_fp16.h:4504: fatal error: nv/target" >&2; exit 1;;
esac"""
REFUSES = """case "$*" in *-E*) exit 0;; esac
echo "kernels.cu(3): error: no such thing" >&2; exit 1"""


@pytest.mark.parametrize(
    ("script", "words", "begun"),
    [
        (NO_HEADERS, r"cannot read CUDA's headers \(.*nv/target\); pip install", set()),
        (REFUSES, "nvcc refused the kernels for sm_90a", {"lower", "weights", "build"}),
    ],
    ids=["headers", "kernels"],
)
def test_an_nvcc_that_does_not_compile(model, tmp_path, monkeypatch, script, words, begun):
    program(tmp_path / "nvcc", script)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: str(tmp_path / "nvcc"))
    stages = set()
    with pytest.raises(TargetError, match=words):
        amx_tvm.compile(
            model,
            target="cuda:sm_90a",
            output=tmp_path / "out",
            progress=lambda stage, *_: stages.add(stage),
        )
    assert stages - {"fit"} == begun and not (tmp_path / "out").exists()


def test_nvcc_of_a_wheel(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    wheel = tmp_path / "nvidia" / "cu13" / "bin"
    wheel.mkdir(parents=True)
    nvcc = program(wheel / "nvcc", "echo")
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    assert toolchain.find_nvcc() == str(nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
    (tmp_path / "other" / "bin").mkdir(parents=True)
    mine = program(tmp_path / "other" / "bin" / "nvcc", "echo")
    assert toolchain.find_nvcc() == str(mine)
