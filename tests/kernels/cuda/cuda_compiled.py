"""Compiling kernels as an artifact would, and reading what came out.

One run of nvcc makes all that a test reads: machine code, PTX and what ptxas says of it.
"""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

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


@dataclass(frozen=True)
class Compiled:
    """CUDA C++ that TVM generated, its machine code, PTX, and ptxas's messages."""

    code: str
    cubin: bytes
    ptx: str
    report: str

    def resources(self) -> dict[str, Resources]:
        """Registers, stack and spilled bytes by kernel, as ptxas reports them."""
        found = {}
        for part in self.report.split("Compiling entry function '")[1:]:
            numbers = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
            stack, stores, loads = map(int, re.search(numbers, part).groups())
            registers = int(re.search(r"Used (\d+) registers", part)[1])
            found[part.split("'")[0]] = Resources(registers, stack, stores + loads)
        return found

    def clean(self) -> bool:
        """Whether no kernel has a stack or spills, and no product is serialized by ptxas."""
        used = self.resources().values()
        whole = "Potential Performance Loss" not in self.report
        return bool(used) and whole and not any(r.stack or r.spilled for r in used)


def _build(functions: dict, arch: str, compiler) -> str:
    """Build PrimFuncs for an architecture; the generated CUDA C++, which the compiler gets."""
    import tvm

    toolchain.enable()
    texts = []

    def capture(code: str, arch: str, **more) -> bytes:
        texts.append(code)
        return compiler(code, arch, **more)

    module = {k: f.with_attr("global_symbol", k) for k, f in functions.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "compile_source", capture)
        built = tvm.compile(tvm.IRModule(module), target=target(arch))
    assert built.mod.imports[0].kind == "cuda"  # not the fallback that holds source
    return texts[0]


def cuda_text(functions: dict, arch: str) -> str:
    """CUDA C++ of PrimFuncs by name; nothing compiles it."""
    return _build(functions, arch, lambda _code, _arch, **_: b"")


def compile_functions(functions: dict, arch: str) -> Compiled:
    """Compile PrimFuncs by name for an architecture."""
    real, made = toolchain.compile_source, {}
    with TemporaryDirectory() as folder:
        flags = ("-Xptxas", "-v", "-keep", "-keep-dir", folder)

        def compiler(code: str, arch: str, **more) -> bytes:
            with redirect_stdout(StringIO()) as report:
                made["cubin"] = real(code, arch, flags=flags, **more)
            made["report"] = report.getvalue()
            return made["cubin"]

        code = _build(functions, arch, compiler)
        return Compiled(code, ptx=(Path(folder) / "kernels.ptx").read_text(), **made)
