"""What kernels ask of a GPU: its architecture's instructions and its sizes.

A target names an architecture, such as "sm_90a", and one artifact runs on every GPU of it. Kernels
are right on all of them; sizes (multiprocessors, L2 cache) only decide how fast. ``GPUS`` has, for
each architecture, the GPU that stands for it; a target for another one carries its own number of
multiprocessors (target.py). Numbers are NVIDIA's: the CUDA programming guide's table of compute
capabilities, and the architectures' white papers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from amx_tvm.errors import TargetError

_KB, _MB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Gpu:
    """Facts about a GPU.

    Attributes
    ----------
    arch : str
        Architecture, such as "sm_90a".
    about : str
        GPUs that have it, and what the kernels use there.
    multiprocessors : int
    shared_bytes : int
        Shared memory that one block may take.
    l2_bytes : int
        L2 cache.
    registers : int
        32-bit registers of a multiprocessor.
    """

    arch: str
    about: str
    multiprocessors: int
    shared_bytes: int
    l2_bytes: int
    registers: int = 65536

    @property
    def number(self) -> int:
        """Compute capability as an integer, 90 for sm_90a."""
        return int("".join(c for c in self.arch.removeprefix("sm_") if c.isdigit()))

    @property
    def wgmma(self) -> bool:
        """Whether wgmma exists: sm_90a alone, its successor has other instructions."""
        return self.arch == "sm_90a"

    @property
    def clusters(self) -> bool:
        """Whether blocks can form clusters and depend on each other's launches."""
        return self.number >= 90

    @property
    def fp8(self) -> bool:
        """Whether tensor cores multiply E4M3 and E5M2."""
        return self.number >= 89


# The first number of a row is the multiprocessors; the GPU that stands for the architecture is the
# one whose numbers these are.
GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu("sm_80", "A100, A30: mma.sync, cp.async", 108, 163 * _KB, 40 * _MB),
        Gpu("sm_86", "A10, A40, RTX 30", 72, 99 * _KB, 6 * _MB),
        Gpu("sm_87", "Jetson Orin", 16, 163 * _KB, 4 * _MB),
        Gpu("sm_89", "L40S, L4, RTX 40", 142, 99 * _KB, 96 * _MB),
        Gpu("sm_90", "H100 without its own instructions; use sm_90a", 132, 227 * _KB, 50 * _MB),
        Gpu(
            "sm_90a",
            "H100, H200, GH200: wgmma, dependent launch, clusters",
            132,
            227 * _KB,
            50 * _MB,
        ),
        Gpu("sm_100", "B200, B100 (mma.sync)", 148, 227 * _KB, 126 * _MB),
        Gpu("sm_120", "RTX 50 (mma.sync)", 170, 99 * _KB, 96 * _MB),
    )
}


@dataclass(frozen=True)
class Model:
    """A GPU that is sold: what the driver calls it, and how fast its memory is.

    Attributes
    ----------
    name : str
        As the driver says it.
    arch : str
    multiprocessors : int
    bandwidth : int
        Of its memory, 10^9 bytes a second.
    """

    name: str
    arch: str
    multiprocessors: int
    bandwidth: int

    @property
    def short(self) -> str:
        """What people call it, such as "h200"."""
        words = self.name.removeprefix("NVIDIA ").removeprefix("GeForce RTX ")
        return words.split()[0].split("-")[0].lower()

    def distance(self, other: Model) -> float:
        """How different two GPUs are for kernels that read weights."""
        sizes = self.multiprocessors / other.multiprocessors, self.bandwidth / other.bandwidth
        return sum(abs(log(size)) for size in sizes)


# NVIDIA's data sheets. The first of an architecture stands for it.
MODELS = (
    Model("NVIDIA A100-SXM4-80GB", "sm_80", 108, 2039),
    Model("NVIDIA A100-SXM4-40GB", "sm_80", 108, 1555),
    Model("NVIDIA A100 80GB PCIe", "sm_80", 108, 1935),
    Model("NVIDIA A40", "sm_86", 84, 696),
    Model("NVIDIA A10", "sm_86", 72, 600),
    Model("NVIDIA L40S", "sm_89", 142, 864),
    Model("NVIDIA L4", "sm_89", 58, 300),
    Model("NVIDIA GeForce RTX 4090", "sm_89", 128, 1008),
    Model("NVIDIA H100 80GB HBM3", "sm_90a", 132, 3350),
    Model("NVIDIA H100 PCIe", "sm_90a", 114, 2039),
    Model("NVIDIA H200", "sm_90a", 132, 4800),
    Model("NVIDIA GH200 480GB", "sm_90a", 132, 4000),
    Model("NVIDIA H20", "sm_90a", 78, 4000),
    Model("NVIDIA B200", "sm_100", 148, 8000),
)


def model(name: str, arch: str, multiprocessors: int = 0) -> Model:
    """Return a GPU by its driver's name; an unknown one is like its architecture's first."""
    for known in MODELS:
        if known.name == name:
            return known
    first = next((known for known in MODELS if known.arch == arch), None)
    count = multiprocessors or (first.multiprocessors if first else 1)
    speed = first.bandwidth * count // first.multiprocessors if first else 1
    return Model(name or (first.name if first else arch), arch, count, speed)


def named(short: str) -> Model | None:
    """Return the first GPU that people call so; None where there is none."""
    return next((known for known in MODELS if known.short == short.lower()), None)


def gpu(arch: str) -> Gpu:
    """Return the facts of an architecture that the kernels know.

    Raises
    ------
    TargetError
        Otherwise: never fall back to another architecture in silence.
    """
    if arch not in GPUS:
        raise TargetError(
            f"CUDA architecture {arch!r} is not known; expected one of {', '.join(GPUS)}, for "
            "example target='cuda:sm_90a'"
        )
    return GPUS[arch]
