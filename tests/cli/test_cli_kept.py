"""`amx-tvm run`, `list` and `rm`: compiled once, kept in the cache, removed by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amx_tvm.artifact.kept import kept_artifacts, remove_kept
from amx_tvm.cli import asked
from amx_tvm.compiler import kept
from amx_tvm.errors import ArtifactError

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
import tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return a cache of one artifact, its model and its folder."""
    place = tmp_path_factory.mktemp("cache")
    model = tiny_model.write_model(place / "a-model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place))
        assert kept_artifacts() == []
        path = kept.kept_artifact(model, quantization="none")
    return place, model, path


@pytest.fixture
def here(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache[0]))
    return cache


def command(place, *arguments, given=""):
    return python(place, "-m", "amx_tvm", *arguments, given=given)


def python(place, *arguments, given=""):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "XDG_CACHE_HOME": str(place)},
        input=given,
        capture_output=True,
        text=True,
    )


def test_what_is_kept_is_not_compiled_again(here):
    _, model, path = here
    made = (path / "manifest.json").stat().st_mtime_ns
    assert kept.kept_artifact(model, quantization="none") == path
    assert (path / "manifest.json").stat().st_mtime_ns == made
    assert kept.kept_artifact(path) == path  # an artifact is taken as it is


def test_weights_and_quantization_decide(here, monkeypatch):
    _, model, path = here
    asked = []
    monkeypatch.setattr(kept, "compile", lambda *given, **_: asked.append(given))
    assert kept.kept_artifact(model, quantization="amxfp4") != path
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert kept.kept_artifact(model, quantization="none") != path
    finally:
        weights.write_bytes(content)
    assert len(asked) == 2


def test_the_same_question_again_imports_no_compiler(here, monkeypatch):
    """Another quantization, fewer CPU features or cores are another question."""
    place, model, path = here
    question = asked.Question(str(model), "llvm", "none")
    assert question.answer() is None
    question.remember(path)
    assert asked.Question(str(model), "llvm", "none").answer() == path
    assert asked.Question(str(model), "llvm", "amxfp4").answer() is None
    program = (
        "import sys; from amx_tvm.cli.run_command import _artifact;"
        f"print(_artifact({str(model)!r}, 'llvm', 'none', True), 'tvm' in sys.modules)"
    )
    assert python(place, "-c", program).stdout == f"{path} False\n"
    for name, other in (("cpu_features", frozenset), ("limit", lambda: "x86-64-v2")):
        monkeypatch.setattr(asked, name, other)
        assert asked.Question(str(model), "llvm", "none").answer() is None
        monkeypatch.undo()


def test_the_commands(here):
    place, model, path = here
    (listed,) = json.loads(command(place, "list", "--json").stdout)
    assert listed["path"] == str(path) and listed["model"] == "a-model"
    assert path.name in command(place, "list").stdout
    answer = command(place, "run", model, "the cat", "--quantization", "none", "-n", 3, "--quiet")
    assert answer.returncode == 2 and "chat template" in answer.stderr  # this model has none


@pytest.mark.parametrize("name", ["nothing", "", "../a-model"])
def test_a_name_of_nothing_removes_nothing(here, name):
    with pytest.raises(ArtifactError, match="is no kept artifact"):
        remove_kept([name])
    assert here[2].is_dir()


def test_rm(cache, tmp_path):
    _, _, path = cache
    place = tmp_path / "amx-tvm" / "artifacts"
    for name in ("a-one", "a-two", "b"):
        (place / name).mkdir(parents=True)
        (place / name / "manifest.json").write_bytes((path / "manifest.json").read_bytes())
        (place / f".asked-{name}").symlink_to(name)
    assert "several" in command(tmp_path, "rm", "a-").stderr
    assert command(tmp_path, "rm").returncode == 2
    assert str(place / "a-one") in command(tmp_path, "rm", "a-o").stdout
    assert sorted(folder.name for folder in place.iterdir()) == [
        *(".asked-a-two", ".asked-b"),
        *("a-two", "b"),
    ]
    assert command(tmp_path, "rm", "--all").returncode == 0 and not list(place.iterdir())
    assert "nothing is kept" in command(tmp_path, "list").stderr
