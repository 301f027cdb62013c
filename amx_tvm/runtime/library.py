"""Load TVM's runtime library, and nothing else of TVM.

`import tvm` would load the 100 MB compiler library. Running an artifact does not need it: tvm_ffi
(the Python binding) and libtvm_runtime (3 MB, the virtual machine and the KV cache) are enough.
libtvm_runtime is found beside the tvm package without importing it, or where ``AMX_TVM_RUNTIME``
points on a device that has no tvm package at all.

TVM quirks (0.27): the executable's library resolves symbols of tvm_ffi and libtvm_runtime from the
process, so both load with RTLD_GLOBAL before it; TVM's thread pool reads ``TVM_NUM_THREADS`` when
it starts and otherwise takes half of the logical cores.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
import threading
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from amx_tvm.errors import ArtifactError, TargetError

RUNTIME_VARIABLE = "AMX_TVM_RUNTIME"
_TOOLKIT = "/usr/local/cuda/lib64/"


def import_ffi() -> ModuleType:
    """Import and return tvm_ffi; ``amx_tvm.without_torch`` keeps it from importing torch."""
    try:
        import tvm_ffi
    except ImportError as error:
        raise ArtifactError(
            f"tvm_ffi cannot be imported ({error}); `pip install apache-tvm-ffi==0.1.14.post1`"
        ) from error
    return tvm_ffi


def installed_versions() -> tuple[str, str]:
    """Return the versions of TVM and tvm_ffi that are installed.

    Without the tvm package (only libtvm_runtime, through ``AMX_TVM_RUNTIME``) the first is "".
    """
    return _version("apache-tvm"), _version("apache-tvm-ffi")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def find_library(name: str = "tvm_runtime") -> Path:
    """Return the path of ``lib<name>.so``.

    Raises
    ------
    ArtifactError
        Neither ``AMX_TVM_RUNTIME`` (a folder or the runtime library's path) nor the tvm package
        has it.
    """
    places: list[Path] = []
    if value := os.environ.get(RUNTIME_VARIABLE):
        places.append(Path(value).parent if Path(value).is_file() else Path(value))
    else:
        spec = importlib.util.find_spec("tvm")
        if spec is not None and spec.submodule_search_locations:
            places.extend(Path(place) / "lib" for place in spec.submodule_search_locations)
    for place in places:
        if (place / f"lib{name}.so").is_file():
            return (place / f"lib{name}.so").resolve()
    looked = ", ".join(map(str, places)) or "nowhere: there is no tvm package"
    raise ArtifactError(
        f"lib{name}.so was not found (looked in {looked}); `pip install apache-tvm==0.27.0.post1` "
        f"or set {RUNTIME_VARIABLE} to the folder that holds it"
    )


def cuda_files(place: str) -> list[str]:
    """Return where a file of CUDA 13 may be that a Python wheel of NVIDIA brings, such as bin/nvcc.

    Their wheels share one folder, nvidia/cu13, of whatever folder Python imports from.
    """
    roots = dict.fromkeys(path or "." for path in sys.path)
    found = (Path(root) / "nvidia" / "cu13" / place for root in roots)
    return [str(path) for path in found if path.is_file()]


def load_cudart() -> None:
    """Load libcudart.so.13, which TVM's CUDA libraries need, from wherever it is.

    Raises
    ------
    OSError
        The loader's reason, where it is nowhere.
    """
    name = "libcudart.so.13"
    for last, place in enumerate(places := [name, *cuda_files(f"lib/{name}"), _TOOLKIT + name], 1):
        try:
            ctypes.CDLL(place, ctypes.RTLD_GLOBAL)
            return
        except OSError:
            if last == len(places):
                raise


@lru_cache(maxsize=8)
def load_runtime(device: str = "cpu") -> ModuleType:
    """Load tvm_ffi and TVM's runtime (for CUDA also libtvm_runtime_cuda) and return tvm_ffi."""
    tvm_ffi = import_ffi()
    names = ["tvm_runtime"] + (["tvm_runtime_cuda"] if device == "cuda" else [])
    for name in names:
        path = find_library(name)
        try:
            if name == "tvm_runtime_cuda":
                load_cudart()
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # a second load returns the first
        except OSError as error:
            if device == "cuda":
                raise TargetError(
                    f"the CUDA runtime cannot be loaded ({error}); this artifact needs an NVIDIA "
                    "driver, and libcudart.so.13: pip install nvidia-cuda-runtime"
                ) from error
            raise ArtifactError(
                f"{path} cannot be loaded ({error}); reinstall apache-tvm"
            ) from None
    return tvm_ffi


def return_memory() -> None:
    """Give the system what was freed; glibc keeps it otherwise, in an arena for each thread."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def physical_cores() -> int:
    """Return how many physical cores this process may use.

    Hyperthreads of one core count once (they share the vector units); the affinity mask and a
    cgroup's CPU quota (containers) are respected.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not allowed:
        return max(1, (os.cpu_count() or 2) // 2)
    cores = set()
    for cpu in allowed:
        try:
            path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            cores.add(Path(path).read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(cpu))
    return _quota(len(cores))


def usable_cores() -> int:
    """Return how many logical cores this process may use."""
    return _quota(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None)


def _quota(count: int | None) -> int:
    """Return a number of cores, or what a cgroup's CPU quota (containers) leaves of it."""
    count = count or os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, int(quota) // int(period))
    except (OSError, ValueError):
        pass
    return max(1, count)


def set_threads(threads: int | None) -> int:
    """Choose the number of threads of TVM's pools that start from now on, and return it.

    Parameters
    ----------
    threads : int, optional
        The count; by default ``TVM_NUM_THREADS`` if it is set, else the physical cores. More than
        the cores that this process may use are no help: their workers wait for each other, and the
        process for them at its end. They are cut to the cores, with a warning.

    Raises
    ------
    TargetError
        The number is none.
    """
    if threads is None:
        given = os.environ.get("TVM_NUM_THREADS", "")
        threads = int(given) if given.isdigit() and int(given) > 0 else physical_cores()
    elif isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise TargetError(f"threads is {threads!r}, expected an integer of at least 1")
    most = usable_cores()
    if threads > most:
        warnings.warn(
            f"{threads} threads on {most} cores: {most} are used", RuntimeWarning, stacklevel=2
        )
        threads = most
    os.environ["TVM_NUM_THREADS"] = str(threads)
    return threads


def start_pool(threads: int | None) -> None:
    """Make the pool of workers of the calling thread, which TVM would make at the first call."""
    ffi = load_runtime()
    with _POOLS:
        if threads is not None:
            os.environ["TVM_NUM_THREADS"] = str(threads)
        ffi.get_global_func("runtime.NumThreads")()


_POOLS = threading.Lock()  # from the number of threads to the pool


def _forked() -> None:
    global _POOLS
    _POOLS = threading.Lock()


os.register_at_fork(after_in_child=_forked)
