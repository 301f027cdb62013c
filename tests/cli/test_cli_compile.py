"""compile: what reaches the compiler, what is printed, and that failures leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest

import amx_tvm.compiler
from amx_tvm.artifact import ArtifactWriter, Manifest, Variant
from amx_tvm.compiler import Artifact
from amx_tvm.errors import FormatError
from tuning.records import SHIPPED


@pytest.fixture
def compiler(monkeypatch, artifact):
    """Replace the compiler by one that calls back, writes a shard and then does ``end``."""
    calls = []

    class Fake:
        end = staticmethod(lambda: None)

    def compile(model, **options):
        calls.append((model, options))
        progress = options["progress"]
        with ArtifactWriter(options["output"], options["overwrite"]) as writer:
            progress("lower", 0, 1, "name")
            (writer.path("lib.so")).write_bytes((artifact / "lib.so").read_bytes())
            for index in range(3):
                writer.parameters.add(f"w{index}", __import__("numpy").ones(5, "f4"))
                progress("weights", index + 1, 3, f"w{index}")
            Fake.end()
            manifest = writer.finish(
                dataclasses.replace(
                    Manifest.load(artifact),
                    library=writer.library(),
                    parameters=writer.parameters.finish(),
                )
            )
        return Artifact(str(options["output"]), manifest)

    monkeypatch.setattr(amx_tvm.compiler, "compile", compile)
    Fake.calls = calls
    return Fake


def test_compile_passes_the_options_and_prints_the_path(run, compiler, tmp_path):
    output = tmp_path / "out"
    code, out, err = run(
        "compile", "model.gguf", "--target", "llvm:x86-64-v3", "--quantization", "mxfp4",
        "--output", output, "--strict", "--dump-ir", tmp_path / "ir",
    )  # fmt: skip
    assert code == 0 and out == f"{output}\n"
    assert "bits per weight" in err and "3/3" in err and "toy" in err
    model, options = compiler.calls[0]
    assert model == "model.gguf"
    assert options["target"] == "llvm:x86-64-v3" and options["quantization"] == "mxfp4"
    assert options["strict"] is True and options["overwrite"] is False
    assert options["dump_ir"] == tmp_path / "ir"
    assert Manifest.load(output).parameters.order == ["w0", "w1", "w2"]


def test_quiet(run, compiler, tmp_path):
    code, out, err = run("compile", "m", "-o", tmp_path / "out", "-q")
    assert (code, out, err) == (0, f"{tmp_path / 'out'}\n", "")


@pytest.mark.parametrize("error", [FormatError("layer 3 holds NaN"), KeyboardInterrupt()])
def test_failure_leaves_nothing(run, compiler, tmp_path, error):
    def end():
        raise error

    compiler.end = staticmethod(end)
    code, out, err = run("compile", "m", "-o", tmp_path / "out")
    assert out == "" and list(tmp_path.iterdir()) == []
    if isinstance(error, KeyboardInterrupt):
        assert code == 130
    else:
        assert code == 2 and err.endswith("error: layer 3 holds NaN\n")


def test_interrupt_inside_tvm_counts_as_interrupt(run, compiler, tmp_path):
    """TVM turns a KeyboardInterrupt of a Python callback into a RuntimeError."""

    def end():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError from None

    compiler.end = staticmethod(end)
    code, _, err = run("compile", "m", "-o", tmp_path / "out", "-q")
    assert (code, err) == (130, "") and list(tmp_path.iterdir()) == []

    def broken():
        raise RuntimeError("a defect")

    compiler.end = staticmethod(broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run("compile", "m", "-o", tmp_path / "out", "-q")


def test_existing_output_needs_overwrite(run, compiler, tmp_path):
    output = tmp_path / "out"
    assert run("compile", "m", "-o", output)[0] == 0
    code, _, err = run("compile", "m", "-o", output)
    assert code == 2 and "--overwrite" in err
    assert run("compile", "m", "-o", output, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing-here.gguf"], ["nothing-here.gguf"]),
        (["MODEL", "--quantization", "fp3"], ["fp3", "amxfp4"]),
        (["MODEL", "--target", "abacus"], ["abacus"]),
    ],
    ids=str,
)
def test_bad_input_of_the_real_compiler(run, tmp_path, arguments, words):
    model = tmp_path / "model"
    model.mkdir()
    arguments = [str(model) if word == "MODEL" else word for word in arguments]
    code, out, err = run("compile", *arguments, "-o", tmp_path / "out", "-q")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert [path.name for path in Path(tmp_path).iterdir()] == ["model"]


def test_json_says_what_was_made(run, compiler, tmp_path):
    code, out, err = run("compile", "model.gguf", "-o", tmp_path / "out", "--json", "-q")
    made = json.loads(out)
    assert (code, err) == (0, "") and made["path"] == str(tmp_path / "out")
    assert made["parameters"] > 0 and made["bits_per_weight"] == 32.0 and made["seconds"] >= 0


def test_the_records_that_ship_as_json(run):
    (file, *_) = json.loads(run("tune", "list", "--json")[1])
    assert file["records"] > 0 and file["unreadable"] == 0
    shown = json.loads(run("tune", "show", SHIPPED / file["file"], "--json")[1])
    assert len(shown["records"]) == file["records"] and shown["unreadable"] == []


def test_export_says_what_was_made_as_json(run, artifact, tmp_path, monkeypatch):
    from amx_tvm.exporting import api

    made = api.Bundle(str(tmp_path / "out"), Manifest.load(artifact), 30, 10)
    monkeypatch.setattr(api, "export", lambda *_, **__: made)
    command = ("export", artifact, "--target", "x86-64-v3", "-o", tmp_path / "out", "-q")
    assert run(*command)[1] == f"{made.path}\n"
    said = json.loads(run(*command, "--json")[1])
    assert (said["path"], said["bytes"], said["runtime_bytes"]) == (made.path, 30, 10)
    assert said["variants"] == []


def test_export_names_every_level(run, artifact, tmp_path, monkeypatch):
    from amx_tvm.exporting import api

    manifest = Manifest.load(artifact)
    keys = ("llvm/x86-64/x86-64-v4", "llvm/x86-64/x86-64-v3")  # the most demanding first
    others = [
        Variant(dataclasses.replace(manifest.target, key=key), manifest.library) for key in keys
    ]
    made = api.Bundle("out", dataclasses.replace(manifest, variants=others), 30, 10)
    monkeypatch.setattr(api, "export", lambda *_, **__: made)
    command = ("export", artifact, "--target", "x86-64-v2,x86-64-v3,x86-64-v4", "-o", "out")
    line = " ".join(run(*command)[2].split())
    assert f"for {manifest.target.key} and {keys[1]} and {keys[0]}: " in line
    assert json.loads(run(*command, "--json")[1])["variants"] == [keys[1], keys[0]]
