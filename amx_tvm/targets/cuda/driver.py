"""The NVIDIA driver: the GPUs that it lists, and a stand-in where there is none.

TVM's library libtvm_runtime_cuda.so links to nine functions of libcuda.so.1. To build code on a
machine without a GPU they only have to be there: the stand-in's answer with an error.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from amx_tvm.errors import TargetError
from amx_tvm.scratch import scratch

_DRIVER = "libcuda.so.1"
_COMPUTE_MAJOR, _COMPUTE_MINOR, _MULTIPROCESSORS = 75, 76, 16  # CUdevice_attribute

_STUB = r"""
typedef int R;
#define F(name) R name(void) { return 100; } /* CUDA_ERROR_NO_DEVICE */
F(cuInit) F(cuDeviceGetCount)
F(cuModuleLoadData) F(cuModuleUnload) F(cuModuleGetFunction) F(cuFuncSetAttribute)
F(cuLaunchKernelEx) F(cuDeviceGetName) F(cuTensorMapEncodeTiled)
R cuGetErrorName(R e, const char** s) { *s = "CUDA_ERROR_NO_DEVICE"; return 0; }
R cuGetErrorString(R e, const char** s) { *s = "no CUDA driver on this machine"; return 0; }
"""


@dataclass(frozen=True)
class GpuHere:
    """A GPU of this machine: its memory in bytes, its compute capability such as "9.0"."""

    index: int
    name: str
    capability: str
    multiprocessors: int
    memory: int


def gpus_here() -> list[GpuHere]:
    """List the GPUs that the driver sees; none without a driver."""
    try:
        cuda = ctypes.CDLL(_DRIVER)
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [_gpu_here(cuda, index) for index in range(count.value)]


def _gpu_here(cuda: Any, index: int) -> GpuHere:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    capability = f"{attribute(_COMPUTE_MAJOR)}.{attribute(_COMPUTE_MINOR)}"
    count = attribute(_MULTIPROCESSORS)
    return GpuHere(index, name.value.decode(), capability, count, memory.value)


def load() -> str:
    """Load the driver for the libraries that link to it, or the stand-in: "driver" or "stub".

    Raises
    ------
    TargetError
        Where there is neither a driver nor a C compiler.
    """
    try:
        ctypes.CDLL(_DRIVER, ctypes.RTLD_GLOBAL)
    except OSError:
        _load_stub()
        return "stub"
    return "driver"


def _load_stub() -> None:
    """Compile and load the stand-in; a loaded library needs its file no longer."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise TargetError("building for CUDA needs a C compiler (cc or gcc); none was found")
    with scratch("amx-tvm-stub-") as folder:
        source, library = folder / "stub.c", folder / _DRIVER
        source.write_text(_STUB)
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{_DRIVER}", "-o", str(library)]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise TargetError(f"the stub driver did not compile: {done.stderr.strip()}")
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
