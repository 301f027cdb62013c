"""Every program of examples/ runs; what compiles is marked slow."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
QUICK = {
    "stream": "tokens,",
    "chat": "In which country",
    "batch": "'A cat' ->",
    "scheduler": "the second has ended",
    "fork_and_score": "The capital of France is Paris",
    "formats": "amxfp4 ",
}


@pytest.fixture
def example(monkeypatch, capsys):
    """Run a program in this process and return what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_readme_names_them_all():
    named = re.findall(r"^\| `(\w+)\.py` \|", (EXAMPLES / "README.md").read_text("utf-8"), re.M)
    assert sorted(named) == sorted(file.stem for file in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", QUICK)
def test_an_artifact_s(example, artifact, name):
    assert QUICK[name] in example(name, artifact)


def test_structured_output(example, artifact):
    """A model of random weights: the form makes it an answer all the same."""
    pytest.importorskip("openai")
    from serving import serving

    with serving(artifact) as running:
        assert '"capital": ' in example("structured_output", running.url)


def test_the_notebook(artifact, capsys):
    """Its cells of code, one behind the other."""
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text("utf-8"))["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace("../dist/smollm2", str(artifact))
            assert not cell["outputs"] and cell["execution_count"] is None
            exec(compile(code, "tour.ipynb", "exec"), names)
    assert "MB of parameters" in (out := capsys.readouterr().out) and "nvfp4 " in out


@pytest.mark.slow
def test_torch_module(example):
    assert "bits a weight, output error 0.1" in example("torch_module")


@pytest.mark.slow
def test_raspberry_pi(example, tmp_path, monkeypatch):
    """As on a machine without a cross compiler."""
    from tiny_model import write_model

    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = write_model(tmp_path / "model")
    assert "link.py" in example("raspberry_pi", model, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "manifest.json").is_file()


@pytest.mark.slow
def test_tune_kernel():
    command = [sys.executable, EXAMPLES / "tune_kernel.py", "64", "64", "2"]
    done = subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True)
    assert done.returncode == 0 and " trials" in done.stdout, done.stderr
