"""Runs kernels for other CPUs under qemu's user-mode emulation."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's
needs_emulator = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR}",
)


class Emulated:
    """A compiled PrimFunc, called with tensors like one of this machine; the last is written.

    Parameters
    ----------
    func : PrimFunc
        The kernel.
    target : Target
        An AArch64 one.
    cpu : str
        What qemu emulates, such as "cortex-a76" or "max".
    folder : Path
        For the program and its files.
    """

    def __init__(self, func, target, cpu, folder):
        self.cpu, self.folder = cpu, Path(folder)
        built = tvm.compile(tvm.IRModule({"f": func.with_attr("global_symbol", "f")}), target)
        built.mod.write_to_file(str(self.folder / "kernel.o"), "o")
        main, self.program = Path(__file__).with_suffix(".c"), self.folder / "program"
        command = [COMPILER, "-static", "-O1", main, self.folder / "kernel.o", "-lm"]
        subprocess.run([*command, "-o", self.program], check=True)

    def __call__(self, *tensors):
        """Run the kernel."""
        arrays = [t.numpy() for t in tensors]
        job, out = self.folder / "job", self.folder / "out"
        with job.open("wb") as f:
            f.write(struct.pack("<i", len(arrays)))
            for a in arrays:
                f.write(struct.pack("<3i", a.ndim, CODES[a.dtype.kind], a.itemsize * 8))
                f.write(struct.pack(f"<{a.ndim}q", *a.shape) + a.tobytes())
        command = [EMULATOR, "-cpu", self.cpu, self.program, job, out]
        subprocess.run(command, check=True, timeout=60)
        tensors[-1].copyfrom(np.fromfile(out, arrays[-1].dtype).reshape(arrays[-1].shape))
