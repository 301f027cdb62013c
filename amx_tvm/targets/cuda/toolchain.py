"""Machine code in artifacts: real cubins for a named architecture, with or without a GPU here.

TVM 0.27 registers its CUDA module only when libtvm_runtime_cuda.so loads, and that library needs
libcuda.so.1, the driver. Where there is no driver its code generator silently falls back to a
module that holds CUDA *source*, which the machine that runs the artifact would have to compile; and
where the architecture is not named it silently takes sm_50. This module closes both gaps:

    enable()   loads the driver, or a stand-in where there is none (driver.py), and then that
               library
    compile    a `tvm_callback_cuda_compile` of its own: nvcc, or nvrtc where there is no nvcc,
               always for the architectures of the current target, an unknown one refused

so `tvm.compile(mod, target)` and `export_library` write a library that needs only a driver.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from amx_tvm.errors import TargetError
from amx_tvm.extras import install
from amx_tvm.runtime.library import cuda_files, load_cudart
from amx_tvm.scratch import scratch

from . import driver
from .gpus import gpu
from .target import architectures_of


class CudaBuildError(TargetError):
    """CUDA code could not be built for the architecture that was asked for."""


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
    kind = driver.load()
    try:
        load_cudart()
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise CudaBuildError(
            f"TVM's CUDA runtime {library.name} does not load ({error}); it needs CUDA 13's "
            f"runtime: {install('cuda')}"
        ) from error
    return kind


def find_nvcc() -> str | None:
    """Path of nvcc: of CUDA_HOME, of a Python wheel, of PATH or of /usr/local/cuda; None without.

    A wheel comes before PATH, as somebody has installed it here for this.
    """
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else []
    places += [*cuda_files("bin/nvcc"), shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and Path(place).is_file()), None)


def compiler_problem() -> str:
    """Return what keeps CUDA code from being compiled here, "" where nothing does."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "" if find_spec("cuda") else "CUDA 13's nvcc is needed, and none was found"
    with scratch("amx-tvm-nvcc-") as folder:
        (folder / "headers.cu").write_text("#include <cuda_fp16.h>\n")
        command = [nvcc, "-E", "-o", os.devnull, str(folder / "headers.cu")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    said = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
    return f"{nvcc} cannot read CUDA's headers ({said[0][-200:]})"


def require_compiler() -> None:
    """Find that CUDA code can be compiled here, before the work.

    Raises
    ------
    CudaBuildError
        Where there is neither nvcc nor nvrtc's Python binding, or nvcc lacks its headers.
    """
    if problem := compiler_problem():
        raise CudaBuildError(f"compiling for a GPU: {problem}; {install('cuda')}")


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
        A key of `gpus.GPUS`.
    also : tuple of str
        More architectures; they need nvcc.
    flags : tuple of str
        More options for nvcc, such as ("-Xptxas", "-v").
    ptx : bool
        Stop at the text of PTX.

    Raises
    ------
    TargetError
        Unknown architecture, no compiler, or the compiler's own message.
    """
    numbers = [gpu(a).arch.removeprefix("sm_") for a in (arch, *also)]
    nvcc = find_nvcc()
    if nvcc is None and also:
        raise CudaBuildError(
            f"code for {'+'.join((arch, *also))} in one artifact needs nvcc, and none was found; "
            "name one architecture"
        )
    if nvcc is None:
        return _compile_nvrtc(code, arch, "ptx" if ptx else "cubin")
    with scratch("amx-tvm-nvcc-") as folder:
        source, out = folder / "kernels.cu", folder / "kernels.cubin"
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
            f"no nvcc was found and nvrtc could not compile for {arch}: {error}; {install('cuda')}"
        ) from error


def _register_compiler() -> None:
    """Replace TVM's callback by one that insists on a named architecture.

    TVM 0.27 calls the callback with the source alone and, in some pipelines, outside any target's
    scope; its code generator is wrapped so that the callback always sees the target it is for.
    """
    import tvm
    import tvm_ffi
    from tvm.target import Target

    tvm_ffi.register_error("CudaBuildError", CudaBuildError)  # it passes through TVM as itself
    generate = tvm.get_global_func("target.build.cuda")

    def build_in_scope(mod, cuda):  # noqa: ANN001, ANN202
        with cuda:
            return generate(mod, cuda)

    tvm_ffi.register_global_func("target.build.cuda", build_in_scope, override=True)

    def tvm_callback_cuda_compile(code: str) -> bytes:
        current = Target.current(allow_none=True)
        arch, *also = architectures_of(current) if current is not None else ("",)
        return compile_source(code, arch, also=tuple(also))

    tvm_ffi.register_global_func(
        "tvm_callback_cuda_compile", tvm_callback_cuda_compile, override=True
    )
