"""What the machine's memory gives: read bandwidth and this process's peak, without the compiler.

The bandwidth is that of summing 64-bit words from huge pages, each thread over a part of its own:
NumPy's loop leaves the arithmetic far behind the memory, and on the machines tried it read as fast
as, or faster than, a loop of vector loads with software prefetch that TVM compiled.
"""

from __future__ import annotations

import mmap
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from amx_tvm.artifact.memory import HUGE_PAGE

MEGABYTES = 400  # many times the last-level cache of a desktop or of a slice of a server


def read_bandwidth(threads: int, megabytes: int = MEGABYTES, repeats: int = 9) -> float:
    """Return the bytes a second that ``threads`` cores read from memory, median of ``repeats``.

    Parameters
    ----------
    threads : int
        Threads that read at the same time.
    megabytes : int
        Size of what is read, in MiB; it should be many times the last-level cache.
    repeats : int
        Passes over it.
    """
    data = _huge_array(megabytes << 20)
    data[:] = 1  # every page exists
    parts = np.array_split(data.view(np.int64), threads)
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            times.append(time.perf_counter() - start)
    return data.nbytes / float(np.median(times[1:]))


def _huge_array(size: int) -> np.ndarray:
    """Return uint8 [size] in pages of 2 MiB, where the system grants them."""
    area = mmap.mmap(-1, size + HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(area, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + size]


def peak_memory() -> int:
    """Return the most bytes that this process has occupied so far.

    From /proc, since Linux's ``ru_maxrss`` of a fresh process still counts its parent's memory.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
