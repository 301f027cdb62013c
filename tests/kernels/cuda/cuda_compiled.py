"""Compiling kernels as an artifact would, and reading what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from amx_tvm.targets.cuda import toolchain
from amx_tvm.targets.cuda.target import target

ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100")
needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="needs nvcc")


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel."""

    registers: int
    stack: int
    spilled: int


def compile_functions(functions: dict, arch: str, text_only: bool = False) -> tuple[str, bytes]:
    """Build PrimFuncs for an architecture; the generated CUDA C++ and the cubin, empty for text."""
    import tvm

    toolchain.enable()
    seen = {}
    real = toolchain.compile_source

    def capture(code: str, arch: str, **more) -> bytes:
        seen["code"], seen["cubin"] = code, b"" if text_only else real(code, arch, **more)
        return seen["cubin"]

    module = {k: f.with_attr("global_symbol", k) for k, f in functions.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "compile_source", capture)
        tvm.compile(tvm.IRModule(module), target=target(arch))
    return seen["code"], seen["cubin"]


def _nvcc(code: str, arch: str, kind: str, *flags: str) -> tuple[str, str]:
    """Run nvcc on a text; its messages and the output as text (empty for a cubin)."""
    number = arch.removeprefix("sm_")
    made_for = f"code={'compute' if kind == 'ptx' else 'sm'}_{number}"
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "k.cu", Path(folder) / "k.out"
        source.write_text(code)
        gencode = f"-gencode=arch=compute_{number},{made_for}"
        command = [str(toolchain.find_nvcc()), "-w", "-std=c++17", gencode, f"-{kind}", *flags]
        done = subprocess.run(
            [*command, "-o", out, source], capture_output=True, text=True, check=True
        )
        return done.stderr, out.read_text() if kind == "ptx" else ""


def ptx(code: str, arch: str) -> str:
    """PTX of generated CUDA C++."""
    return _nvcc(code, arch, "ptx")[1]


def resources(code: str, arch: str) -> dict[str, Resources]:
    """Registers, stack and spilled bytes by kernel, as ptxas reports them."""
    report, _ = _nvcc(code, arch, "cubin", "-O3", "-Xptxas", "-v")
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        stack, stores, loads = (
            int(n)
            for n in re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found[part.split("'")[0]] = Resources(registers, stack, stores + loads)
    return found
