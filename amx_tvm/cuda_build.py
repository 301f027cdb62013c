"""Machine code in artifacts: real cubins for a named architecture, with or without a GPU here.

TVM 0.27 registers its CUDA module only when libtvm_runtime_cuda.so loads, and that library needs
libcuda.so.1, the driver. Where there is no driver its code generator silently falls back to a
module that holds CUDA *source*, which the machine that runs the artifact would have to compile; and
where the architecture is not named it silently takes sm_50. This module closes both gaps:

    enable()   loads the driver, or, where there is none, a stub of the nine functions that TVM's
               library links to (each answers with an error), and then that library
    compile    a `tvm_callback_cuda_compile` of its own: nvcc, or nvrtc where there is no nvcc,
               always for the architecture of the current target, an unknown one refused

so `tvm.compile(mod, target(arch))` and `export_library` write a library that needs only a driver.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from amx_tvm.errors import TargetError

# Compute capability -> what the schedules use there. The "a" of sm_90a carries wgmma.
ARCHITECTURES = {
    "sm_80": "A100, A30: mma.sync, cp.async",
    "sm_86": "RTX 30, A10, A40",
    "sm_87": "Jetson Orin",
    "sm_89": "RTX 40, L4, L40",
    "sm_90": "H100 without its own instructions; prefer sm_90a",
    "sm_90a": "H100, H200, GH200: wgmma, dependent launch, clusters",
    "sm_100": "B100, B200 (mma.sync)",
    "sm_120": "RTX 50 (mma.sync)",
}

_STUB = r"""
typedef int R;
#define F(name) R name(void) { return 100; } /* CUDA_ERROR_NO_DEVICE */
F(cuInit) F(cuDeviceGetCount)
F(cuModuleLoadData) F(cuModuleUnload) F(cuModuleGetFunction) F(cuFuncSetAttribute)
F(cuLaunchKernelEx) F(cuDeviceGetName) F(cuTensorMapEncodeTiled)
R cuGetErrorName(R e, const char** s) { *s = "CUDA_ERROR_NO_DEVICE"; return 0; }
R cuGetErrorString(R e, const char** s) { *s = "no CUDA driver on this machine"; return 0; }
"""


class CudaBuildError(TargetError):
    """CUDA code could not be built for the architecture that was asked for."""


def check_arch(arch: str) -> str:
    """Return `arch` when it is one that the schedules know.

    Raises
    ------
    CudaBuildError
        Otherwise: never fall back to another architecture in silence.
    """
    if arch not in ARCHITECTURES:
        raise CudaBuildError(
            f"CUDA architecture {arch!r} is not known; expected one of "
            f"{', '.join(ARCHITECTURES)}, for example target='cuda:sm_90a'"
        )
    return arch


# An architecture that code is compiled for besides the target's own, as one of its keys
_ALSO = "also-"


def several(names: str) -> list[str]:
    """Split "sm_80+sm_89" into architectures, the one to schedule for first.

    One schedule has to fit all: the one with the least shared memory and the fewest instructions.

    Raises
    ------
    CudaBuildError
        For an unknown architecture.
    """
    from relax_passes.kernels.cuda.buckets import Device

    archs = [check_arch(name) for name in dict.fromkeys(names.split("+"))]
    devices = [Device(a) for a in archs]
    least = min(devices, key=lambda d: (d.clusters, d.wgmma, d.shared_bytes, d.number))
    return [least.arch, *(a for a in archs if a != least.arch)]


def target(arch: str, host: dict | None = None):  # noqa: ANN201 - tvm.target.Target
    """TVM target for an architecture, with the limits that scheduling needs.

    Parameters
    ----------
    arch : str
        A key of ARCHITECTURES, or several joined by "+": the artifact then holds code for each.
    host : dict, optional
        TVM's description of the host processor; the machine's own by default.
    """
    from tvm.target import Target

    first, *others = several(arch)
    config = {
        "kind": "cuda",
        "arch": first,
        "keys": ["cuda", "gpu", *(_ALSO + other for other in others)],
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": 49152,
        "thread_warp_size": 32,
        "registers_per_block": 65536,
    }
    return Target(config, host=host or {"kind": "llvm"})


def cuda_target(arch: str | None = None):  # noqa: ANN201 - tvm.target.Target
    """Target for an architecture, or for the GPU of this machine when none is named.

    TVM is made ready to build for it (`enable`).

    Raises
    ------
    CudaBuildError
        For an unknown architecture, or no name and no GPU here.
    """
    kind = enable()
    if arch is None:
        import tvm

        device = tvm.cuda(0)
        if kind == "stub" or not device.exist:
            raise CudaBuildError(
                "target 'cuda' means the GPU of this machine, and there is none; name an "
                "architecture, for example target='cuda:sm_90a'"
            )
        arch = "sm_" + "".join(str(device.compute_version).split("."))
        arch = {"sm_90": "sm_90a"}.get(arch, arch)
    return target(arch)


@cache
def enable() -> str:
    """Make TVM build real CUDA modules in this process; returns "driver" or "stub".

    Raises
    ------
    CudaBuildError
        When TVM's CUDA runtime library cannot be loaded, with the loader's reason.
    """
    import tvm

    _register_compiler()
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    kind = "driver"
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError:
        kind = "stub"
        _load_stub()
    try:
        _load_cudart()
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise CudaBuildError(
            f"TVM's CUDA runtime {library.name} does not load ({error}); install CUDA 13's "
            "runtime, for example the package nvidia-cuda-runtime"
        ) from error
    return kind


def _load_cudart() -> None:
    """Load libcudart.so.13 from the loader's path, the toolkit or its Python wheel."""
    candidates = ["libcudart.so.13", "/usr/local/cuda/lib64/libcudart.so.13"]
    for root in map(Path, sys.path):
        candidates += map(str, root.glob("nvidia/*/lib/libcudart.so.13"))
    last: OSError | None = None
    for name in candidates:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            return
        except OSError as error:
            last = error
    assert last is not None
    raise last


def _load_stub() -> None:
    """Compile and load the stub driver; a loaded library needs its file no longer."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise CudaBuildError("building for CUDA needs a C compiler (cc or gcc); none was found")
    with tempfile.TemporaryDirectory(prefix="amx-tvm-stub-") as folder:
        source, library = Path(folder) / "stub.c", Path(folder) / "libcuda.so.1"
        source.write_text(_STUB)
        command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CudaBuildError(f"the stub driver did not compile: {done.stderr.strip()}")
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def find_nvcc() -> str | None:
    """Path of nvcc from PATH, CUDA_HOME or /usr/local/cuda; None when there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = Path(home) / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(path) if path.exists() else None)


def architectures_of(target: Any) -> tuple[str, ...]:
    """Architectures that a TVM target's code is for, the one it is scheduled for first."""
    keys = (str(k) for k in target.keys)
    others = (k.removeprefix(_ALSO) for k in keys if k.startswith(_ALSO))
    return (str(target.attrs["arch"]), *others)


def compile_source(
    code: str,
    arch: str,
    *,
    also: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    ptx: bool = False,
) -> bytes:
    """Compile CUDA C++ to a cubin, to a fat binary for several architectures, or to PTX.

    Parameters
    ----------
    code : str
        What TVM generated.
    arch : str
        A key of ARCHITECTURES.
    also : tuple of str
        More architectures; they need nvcc.
    flags : tuple of str
        More options for nvcc, such as ("-Xptxas", "-v").
    ptx : bool
        Stop at the text of PTX.

    Raises
    ------
    CudaBuildError
        Unknown architecture, no compiler, or the compiler's own message.
    """
    numbers = [check_arch(a).removeprefix("sm_") for a in (arch, *also)]
    nvcc = find_nvcc()
    if nvcc is None and also:
        raise CudaBuildError(
            f"code for {'+'.join((arch, *also))} in one artifact needs nvcc, and none was found; "
            "name one architecture"
        )
    if nvcc is None:
        return _compile_nvrtc(code, arch, "ptx" if ptx else "cubin")
    with tempfile.TemporaryDirectory(prefix="amx-tvm-nvcc-") as folder:
        source, out = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        source.write_text(code)
        kind = "compute" if ptx else "sm"
        gencode = [f"-gencode=arch=compute_{n},code={kind}_{n}" for n in numbers]
        command = [
            nvcc,
            "-std=c++17",
            "-O3",
            "-w",
            *gencode,
            "-ptx" if ptx else "-fatbin" if also else "-cubin",
            *flags,
            "-o",
            str(out),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = "\n".join(x for x in done.stderr.splitlines() if "error" in x) or done.stderr
            raise CudaBuildError(f"nvcc refused the kernels for {arch}:\n{errors[:2000]}")
        if flags:
            print(done.stderr)
        return out.read_bytes()


def _compile_nvrtc(code: str, arch: str, form: str) -> bytes:
    """Compile through TVM's nvrtc path (needs cuda-bindings)."""
    from tvm.support import nvcc

    try:
        made = nvcc.compile_cuda(code, target_format=form, arch=arch, compiler="nvrtc")
        return made.encode() if isinstance(made, str) else bytes(made)
    except Exception as error:
        raise CudaBuildError(
            f"no nvcc was found and nvrtc could not compile for {arch}: {error}; install CUDA 13's "
            "nvcc, or cuda-bindings and nvidia-cuda-nvrtc"
        ) from error


def _bound_blocks(code: str) -> str:
    """Promise as many blocks a multiprocessor as a kernel's call of `amx_blocks<N>` names.

    ptxas then keeps to the registers that N blocks leave each other, and without a promise it
    ignores setmaxnreg; TVM 0.27 writes the threads alone.
    """
    start = 'extern "C" __global__'
    head, *kernels = code.split(start)
    promised: dict[str, str] = {}
    for kernel in kernels:
        blocks = re.search(r"\bamx_blocks<(\d+)>\(\)", kernel)
        if blocks:
            named = re.search(r"__launch_bounds__\(\d+\) (\w+)\(", kernel)
            promised[named[1] if named else ""] = blocks[1]
    # declarations come first and apart: TVM's prototypes carry bounds of their own
    for i in range(len(kernels)):
        for name, count in promised.items():
            kernels[i] = re.sub(
                rf"__launch_bounds__\((\d+)\) {name}\(",
                rf"__launch_bounds__(\1, {count}) {name}(",
                kernels[i],
            )
    return start.join([head, *kernels])


def _register_compiler() -> None:
    """Replace TVM's callback by one that insists on a named architecture.

    TVM 0.27 calls the callback with the source alone and, in some pipelines, outside any target's
    scope; its code generator is wrapped so that the callback always sees the target it is for.
    """
    import tvm
    import tvm_ffi
    from tvm.target import Target

    generate = tvm.get_global_func("target.build.cuda")

    def build_in_scope(mod, cuda):  # noqa: ANN001, ANN202
        with cuda:
            return generate(mod, cuda)

    tvm_ffi.register_global_func("target.build.cuda", build_in_scope, override=True)

    def tvm_callback_cuda_compile(code: str) -> bytes:
        current = Target.current(allow_none=True)
        if current is None:
            return compile_source(_bound_blocks(code), "")
        arch, *also = architectures_of(current)
        if also:
            return compile_source(_bound_blocks(code), arch, also=tuple(also))
        return compile_source(_bound_blocks(code), arch)

    tvm_ffi.register_global_func(
        "tvm_callback_cuda_compile", tvm_callback_cuda_compile, override=True
    )
