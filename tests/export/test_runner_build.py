"""The runner's sources are wherever the package is, and what building it lacks is found first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import amx_tvm
from amx_tvm.errors import ArtifactError, FormatError, ModelError, TargetError
from amx_tvm.exporting.runner_build import SOURCES

ROOT = Path(__file__).parents[2]


def test_a_wheel_has_the_sources():
    """The patterns of pyproject.toml reach every file, through the link in the package."""
    assert SOURCES == ROOT / "runner"
    package = ROOT / "amx_tvm" / "exporting"
    assert '"exporting/runner/**/*"' in (ROOT / "pyproject.toml").read_text()
    linked = {f.relative_to(package / "runner") for f in (package / "runner").glob("**/*")}
    assert linked == {f.relative_to(ROOT / "runner") for f in (ROOT / "runner").glob("**/*")}
    assert Path("CMakeLists.txt") in linked


@pytest.mark.parametrize(
    ("target", "options", "error", "words"),
    [
        ("x86-64-v2", {"runtimes": ("runner",)}, ArtifactError, "runner needs (cmake|g)"),
        ("raspberry-pi/4b-aarch64", {"runtimes": ("runner",)}, ArtifactError, "runner needs cmake"),
        ("raspberry-pi/4b-aarch64", {"runtimes": ()}, TargetError, "aarch64-linux-gnu-g"),
        ("x86-64-v2,x86-64-v3", {"runtimes": ("runner",)}, ArtifactError, "runner needs"),
    ],
)
def test_missing_tools_are_found_first(
    tiny_artifact, tmp_path, monkeypatch, target, options, error, words
):
    stages, output = [], tmp_path / "out"
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(error, match=words):
        amx_tvm.export(
            tiny_artifact, target, output, progress=lambda *s: stages.append(s[0]), **options
        )
    assert set(stages) <= {"bundle"} and os.listdir(tmp_path) == ["bin"]


@pytest.mark.parametrize(
    ("model", "options", "error"),
    [("absent", {}, ModelError), (".", {}, ModelError), (".", {"quantization": "x"}, FormatError)],
    ids=str,
)
def test_a_model_that_is_none_is_found_before_what_runs_it(
    tmp_path, monkeypatch, model, options, error
):
    stages = []
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        amx_tvm.export(
            model, "x86-64-v2", "out", progress=lambda *s: stages.append(s[0]), **options
        )
    assert stages == [] and os.listdir(tmp_path) == []


def test_the_tool_of_an_archive_is_looked_for_first(tiny_artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArtifactError, match="needs the zstd tool"):
        amx_tvm.export(tiny_artifact, "x86-64-v2", tmp_path / "out.tar.zst")
    assert os.listdir(tmp_path) == []
