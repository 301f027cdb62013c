"""How commands end: closed pipes, bytes that are no text, what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import amx_tvm
from amx_tvm.errors import AmxError, ModelError

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "amx_tvm"]


def process(*arguments, folder=ROOT, stdout=subprocess.PIPE, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(os.fsencode, map(str, arguments))) if not options.pop("raw", False) else arguments,
        cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def one_line(error):
    return error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "ARTIFACT"],
        ["inspect", "ARTIFACT", "--json"],
        ["generate", "ARTIFACT", "the", "-n", "20", "--ignore-eos"],
        ["tune", "list"],
        ["compile", "--help"],
    ],
    ids=" ".join,
)
def test_a_reader_that_has_enough_is_success(artifact, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [artifact if word == "ARTIFACT" else word for word in arguments]
    done = process(*COMMAND, *arguments, stdout=writer)
    os.close(writer)
    assert done.returncode == 0 and b"Error" not in done.stderr and b"rror:" not in done.stderr


def test_a_full_disk_behind_stdout_is_one_line(artifact):
    with open("/dev/full", "wb") as full:
        done = process(*COMMAND, "inspect", artifact, "--json", stdout=full)
    error = done.stderr.decode()
    assert done.returncode == 2 and one_line(error) and "No space left" in error


@pytest.mark.parametrize(
    ("command", "closed"),
    [
        ("inspect ARTIFACT", ">&-"),
        ("chat ARTIFACT", "<&-"),
        ("generate ARTIFACT a -n 2", "2>&-"),
        ("generate ARTIFACT a -n 2", "<&- >&- 2>&-"),
    ],
)
def test_closed_streams_are_empty_ones(artifact, command, closed):
    """As under cron: Python has no sys.stdin, stdout or stderr then."""
    line = f"{sys.executable} -m amx_tvm {command.replace('ARTIFACT', str(artifact))} {closed}"
    done = process("sh", "-c", line, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        ([b"generate", b"ARTIFACT", b"caf\xe9"], b"", "the prompt holds a byte that is no UTF-8"),
        ([b"generate", b"ARTIFACT", b"-"], b"caf\xe9", "no utf-8"),
        ([b"generate", b"ARTIFACT", b"a", b"--stop", b"\xff"], b"", "stop holds a byte"),
        ([b"chat", b"ARTIFACT"], b"caf\xe9\n", "no utf-8"),
        ([b"chat", b"ARTIFACT", b"--system", b"\xff"], b"hi\n", "--system holds a byte"),
        ([b"generate", b"no\xffwhere", b"a"], b"", "no such artifact"),
    ],
    ids=str,
)
def test_bytes_that_are_no_text(artifact, arguments, stdin, words):
    arguments = [os.fsencode(artifact) if word == b"ARTIFACT" else word for word in arguments]
    command = [os.fsencode(word) for word in COMMAND]
    done = process(*command, *arguments, b"-q", raw=True, input=stdin)
    error = done.stderr.decode()
    assert done.returncode == 2 and one_line(error) and words.lower() in error.lower(), error


def test_chat_keeps_lines_that_begin_with_a_slash(run, artifact):
    """Only its own commands are taken; spaces in front belong to the message."""
    lines = "/what is /reset?\n/help\n  /etc/hosts is a file\n /exit \nnever\n"
    code, out, err = run("chat", artifact, "-n", 4, stdin=lines)
    engine = amx_tvm.runtime.load(artifact)
    first = engine.generate("[user]/what is /reset?\n[assistant]", 4).text
    prompt = (
        f"[user]/what is /reset?\n[assistant]{first}\n[user]  /etc/hosts is a file\n[assistant]"
    )
    assert (code, out) == (0, f"{first}\n{engine.generate(prompt, 4).text}\n")
    assert err.count("prompt tokens") == 2
    for command in ("/reset", "/exit", "/quit", "/help"):
        assert command in err


@pytest.mark.parametrize(
    ("missing", "arguments", "words"),
    [
        ("xgboost", ["tune", "MODEL"], 'amx-tvm[tune]"'),
        ("tornado", ["tune", "MODEL", "--remote", "a:1", "--key", "k"], 'amx-tvm[tune]"'),
        ("matplotlib.figure", ["tune", "MODEL", "--plot", "x.png"], 'amx-tvm[plot]"'),
        ("matplotlib.figure", ["eval", "MODEL", "--plot", "x.png"], 'amx-tvm[plot]"'),
        ("lm_eval", ["eval", "MODEL", "--tasks", "arc_easy"], 'amx-tvm[tasks]"'),
        ("torch", ["compile", "MODEL", "--calibration", "x.txt", "-q"], 'amx-tvm[torch]"'),
        ("huggingface_hub", ["compile", "owner/model", "-q"], 'amx-tvm[hub]"'),
        ("onnx", ["compile", "FILE.onnx", "-q"], 'amx-tvm[onnx]"'),
        ("", ["eval", "MODEL", "--plot", "x.doc"], ".png, .svg, .pdf"),
    ],
    ids=str,
)
def test_what_is_missing_is_found_before_the_model_is(
    run, monkeypatch, tmp_path, missing, arguments, words
):
    """MODEL does not exist, which nobody notices; the line installs an extra of pyproject.toml."""
    monkeypatch.chdir(tmp_path)
    Path("FILE.onnx").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("amx_tvm.extras.distribution", lambda name: name)
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and one_line(err) and words in err, err
    if missing:
        assert "pip install" in err and words.split("[")[1][:-2] in extras()


def extras():
    text = (ROOT / "pyproject.toml").read_text()
    lines = text.partition("[project.optional-dependencies]")[2].partition("[project.")[0]
    return {line.partition(" =")[0] for line in lines.splitlines() if " = [" in line}


def test_without_an_installation_the_line_names_the_checkout(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from amx_tvm import extras as module

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "distribution", missing)
    assert module.install("tune") == f'pip install "{ROOT}[tune]"'


def test_normal_work_prints_no_warnings_of_tvm(tmp_path):
    from tiny_model import write_model

    model = write_model(tmp_path / "model")
    output = tmp_path / "out"
    done = process(
        *COMMAND, "compile", model, "--quantization", "none", "-o", output, "-q", text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    done = process(*COMMAND, "inspect", output, "--json", text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["kind"] == "causal_lm"


def test_a_refused_module_leaves_no_warning_of_tvm(tmp_path):
    file = tmp_path / "m.mlir"
    file.write_text(
        "module { func.func public @main(%x: tensor<2xf32>) -> tensor<2xf32> {\n"
        "  %y = stablehlo.cbrt %x : tensor<2xf32>\n  return %y : tensor<2xf32>\n} }"
    )
    done = process(*COMMAND, "compile", file, "-o", tmp_path / "out", "-q", text=True)
    assert done.returncode == 2 and one_line(done.stderr) and "cbrt" in done.stderr


def test_tensors_without_values_are_refused():
    import torch

    with torch.device("meta"):
        module = torch.nn.Linear(4, 4)
    with pytest.raises(ModelError, match="'weight' of Linear is on the device 'meta'"):
        amx_tvm.compile(module.eval(), example_inputs=(torch.randn(1, 4),))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (MemoryError(), "memory"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "no utf-8"),
        (AmxError("two\nlines"), "two lines"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_system_refuses_is_one_line(run, monkeypatch, error, words):
    from amx_tvm.cli import devices_command

    def refuse(**_):
        raise error

    monkeypatch.setattr(devices_command, "run", refuse)
    code, _, err = run("devices")
    assert code == 2 and one_line(err) and words in err
