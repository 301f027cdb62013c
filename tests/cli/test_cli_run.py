"""generate, chat, inspect and devices: what they print, and how they fail."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import amx_tvm.runtime
from amx_tvm.cli.inspect_command import rows
from relax_passes.chosen import ChosenKernel
from relax_passes.spec import LinearSpec

# The command line with a sampler that takes its time.
SLOW = """
import sys, time, amx_tvm.runtime.sampler as sampler
from amx_tvm.cli import main
old = sampler.Sampler.__call__
sampler.Sampler.__call__ = lambda *a: (time.sleep(0.05), old(*a))[1]
main(sys.argv[1:])
"""


def one_line(message):
    return message.startswith("error: ") and message.count("\n") == 1


def test_generate_prints_the_text(run, artifact):
    code, out, err = run("generate", artifact, "the cat", "-n", 8, "--ignore-eos")
    expected = amx_tvm.runtime.load(artifact).generate("the cat", 8, ignore_eos=True)
    assert (code, out) == (0, expected.text + "\n")
    assert "8 new tokens" in err and "tokens/s" in err and "length" in err


def test_generate_quiet_from_stdin(run, artifact):
    code, out, err = run("generate", artifact, "-", "-n", 8, "-q", stdin="the cat")
    assert code == 0 and out.strip() and err == ""


def test_generate_json(run, artifact):
    options = ("-n", 6, "-t", 1.2, "--seed", 3, "--top-k", 20, "--ignore-eos", "--json")
    first, second = (run("generate", artifact, "the", *options) for _ in range(2))
    data = json.loads(first[1])
    assert len(data["token_ids"]) == 6 and data["finish_reason"] == "length"
    assert data["timings"]["decode_tokens"] == 5
    assert json.loads(second[1])["token_ids"] == data["token_ids"]


def test_generate_chat_uses_the_template(run, artifact):
    code, out, _ = run("generate", artifact, "hello", "--chat", "-n", 5, "--json")
    engine = amx_tvm.runtime.load(artifact)
    expected = engine.generate("[user]hello\n[assistant]", 5)
    assert code == 0 and json.loads(out)["token_ids"] == expected.token_ids


def test_chat_keeps_the_conversation(run, artifact):
    turns = "hello\n/help\nagain\n/reset\nhello\n/exit\nnever\n"
    code, out, err = run("chat", artifact, "-n", 4, "--system", "be brief", stdin=turns)
    engine = amx_tvm.runtime.load(artifact)
    first = engine.generate("[system]be brief\n[user]hello\n[assistant]", 4)
    prompt = f"[system]be brief\n[user]hello\n[assistant]{first.text}\n[user]again\n[assistant]"
    second = engine.generate(prompt, 4)
    assert code == 0
    assert out == f"{first.text}\n{second.text}\n{first.text}\n"
    assert err.count("prompt tokens") == 3 and "/reset" in err
    computed = [int(line.split()[0][1:]) for line in err.splitlines() if "prompt tokens" in line]
    assert computed[1] < len(engine.encode(prompt)) - 10  # the first turn was in the cache


def test_chat_that_no_longer_fits_says_so(run, artifact):
    code, _, err = run("chat", artifact, "-q", "--context-length", 20, stdin="hello " * 30)
    assert code == 2 and one_line(err) and "the context is 20" in err


def test_inspect_tables(run, artifact):
    code, out, _ = run("inspect", artifact)
    assert code == 0
    for text in ("layers.0.qkv", "128 x 64", "matmul", "not quantized", "llvm-test", "32.000"):
        assert text in out


def test_inspect_json(run, artifact):
    code, out, _ = run("inspect", artifact, "--json")
    data = json.loads(out)
    assert code == 0 and data["linears"][0]["kernel"] == "matmul"
    assert data["bytes"]["artifact"] > data["bytes"]["parameters"] > 0


def test_equal_layers_share_a_row():
    linears = [
        ChosenKernel(
            f"model.layers.{layer}.mlp.{part}",
            LinearSpec("int4" if layer == 2 and part == "up" else "amxfp4", 8, 32, m=1),
            "k",
            rows={1: "direct", 32: "panel"},
        )
        for layer in range(5)
        for part in ("up", "down")
    ]
    assert all(row[5] == "1: direct, 32: panel" for row, _ in rows(linears, every=False))
    found = {(row[0], row[1]): count for row, count in rows(linears, every=False)}
    assert found == {
        ("model.layers.{0..1,3..4}.mlp.up", "amxfp4"): 4,
        ("model.layers.2.mlp.up", "int4"): 1,
        ("model.layers.{0..4}.mlp.down", "amxfp4"): 5,
    }
    assert [row[0] for row, _ in rows(linears, every=True)] == [x.name for x in linears]


def test_inspect_needs_no_runtime(artifact):
    script = (
        "import sys; from amx_tvm.cli import main\n"
        "try: main(['inspect', sys.argv[1]])\n"
        "except SystemExit: print([m for m in ('tvm', 'tvm_ffi', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, artifact], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stderr


def test_devices(run):
    code, text, _ = run("devices")
    assert code == 0 and text.startswith("CPU") and "--target llvm" in text and "GPU" in text
    code, out, _ = run("devices", "--json")
    data = json.loads(out)
    assert data["cpu"]["cores"] >= 1 and data["cpu"]["memory"] > 0
    assert isinstance(data["gpus"], list)
    for row in data["targets"]:
        assert row["name"] in ("llvm", "cuda") or f"--target {row['name']}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "ARTIFACT", ""], ["empty"]),
        (["generate", "ARTIFACT", "hi", "--top-p", "2"], ["top_p is 2.0"]),
        (["generate", "ARTIFACT", "a b " * 300], ["tokens, the context is 256"]),
        (["generate", "ARTIFACT", "hi", "--context-length", "512"], ["512", "1 to 256"]),
        (["generate", "ARTIFACT", "hi", "--device", "cuda"], ["'cpu'", "'cuda'"]),
        (["generate", "ARTIFACT", "hi", "--threads", "0"], ["threads is 0"]),
        (["generate", "ARTIFACT"], ["Missing argument", "amx-tvm generate --help"]),
        (["generate", "nowhere", "hi"], ["nowhere", "no such artifact", "compile"]),
        (["inspect", "nowhere"], ["nowhere"]),
        (["brew"], ["No such command 'brew'"]),
        (["generate", "ARTIFACT", "hi", "--verify", "maybe"], ["'none', 'quick', 'full'"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_input_is_one_line_and_code_2(run, artifact, arguments, words):
    code, out, err = run(*(artifact if word == "ARTIFACT" else word for word in arguments))
    assert code == 2 and out == "" and one_line(err)
    for word in words:
        assert word in err


def test_corrupted_shard(run, artifact, tmp_path):
    copy = shutil.copytree(artifact, tmp_path / "copy")
    shard = copy / "params" / "shard-00002.bin"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    code, _, err = run("generate", copy, "hi", "-n", 1)
    assert code == 2 and one_line(err) and "shard-00002.bin is damaged" in err
    assert run("inspect", copy)[0] == 0
    assert run("inspect", copy, "--verify", "quick")[0] == 2


@pytest.mark.parametrize(
    "command", [[], ["compile"], ["generate"], ["chat"], ["inspect"], ["devices"]], ids=str
)
def test_help_has_examples(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0 and "Usage" in out
    if command:
        assert "Examples" in out and f"amx-tvm {command[0]}" in out


def test_interrupt_ends_with_130(artifact):
    command = [sys.executable, "-m", "amx_tvm", "generate", artifact, "the", "-n", "100000"]
    command[1:3] = ["-c", SLOW]
    process = subprocess.Popen(
        [*command, "--ignore-eos"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err


def test_closed_pipe_is_quiet(artifact):
    command = f'"{sys.executable}" -m amx_tvm generate "{artifact}" the -n 200 -q | head -c 1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.slow
def test_whole_process_is_quick(artifact):
    """The bar is 3 s to the first token on a quiet machine; imports must not eat it."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "amx_tvm", "generate", artifact, "the", "-n", "1"],
        check=True,
        capture_output=True,
        env={**os.environ, "TVM_NUM_THREADS": "1"},
    )
    assert time.perf_counter() - start < 3


def test_devices_after_building_for_cuda():
    """The stub driver that stands in for a missing one is not taken for a GPU."""
    from amx_tvm.cli.devices_command import describe_gpus
    from amx_tvm.targets.cuda import toolchain

    if toolchain.enable() != "stub":
        pytest.skip("this machine has an NVIDIA driver")
    assert describe_gpus() == []


def test_what_is_done_is_said_where_it_is_asked_for(run, artifact, monkeypatch):
    """By -v or the variable, on stderr; nothing else changes."""
    monkeypatch.delenv("AMX_TVM_LOG", raising=False)
    log = logging.getLogger("amx_tvm")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", logging.NOTSET)
    plain = run("generate", artifact, "the", "-n", 2, "-q")
    assert plain[2] == ""
    code, out, err = run("-v", "generate", artifact, "the", "-n", 2, "-q")
    assert (code, out) == plain[:2] and "amx_tvm.runtime: " in err and "threads" in err
    monkeypatch.setenv("AMX_TVM_LOG", "debug")
    assert "amx_tvm.runtime: " in run("generate", artifact, "the", "-n", 2, "-q")[2]
    monkeypatch.setenv("AMX_TVM_LOG", "loud")
    code, _, err = run("devices")
    assert code == 2 and "AMX_TVM_LOG is 'loud'" in err
