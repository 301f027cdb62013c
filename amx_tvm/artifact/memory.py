"""Weights in huge pages: why decoding is faster from a copy than from the mapped file.

A decode step reads every weight once. In pages of 4 KiB that is one address translation every
64 cache lines, and in a virtual machine each miss of the TLB walks two page tables. Linux does not
put file mappings of ordinary file systems into huge pages, so the weights are read into anonymous
memory that asks for pages of 2 MiB. The price: the copy takes time at load (about 0.5 s a GB), and
its memory cannot be shared between processes nor dropped under pressure, unlike a mapped file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

HUGE_PAGE = 2 << 20
_Made = TypeVar("_Made")
_BLOCK = 8 << 20
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages_fit(size: int) -> bool:
    """Whether to hold ``size`` bytes of weights in huge pages.

    True where the kernel grants them on request and at most half of the available memory is
    asked for; a machine that is short of memory keeps the mapped file, which it can drop.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        switch = _SWITCH.read_text(encoding="ascii")
    except OSError:
        return False
    if "[never]" in switch:
        return False
    available = available_memory()
    return available is not None and 2 * size <= available


def available_memory(swap: bool = False) -> int | None:
    """Return how many bytes can be allocated, cgroup limit included; without swapping, or with."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        kinds = ("MemAvailable", "SwapFree") if swap else ("MemAvailable",)
        available = sum(int(fields[kind].split()[0]) for kind in kinds) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        available = min(available, max(0, limit - used))
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        pass
    return available


def read_to_huge_pages(path: Path) -> np.ndarray:
    """Read a file into anonymous memory of huge pages; return its bytes, uint8 [size].

    Blocks are read by several threads: the first touch of a page clears it, which takes longer
    than copying out of the page cache.
    """
    size = os.path.getsize(path)
    area = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(area, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    data = whole[start : start + size]
    with open(path, "rb") as file, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:

        def read(offset: int) -> None:
            end = min(offset + _BLOCK, size)
            while offset < end:
                count = os.preadv(file.fileno(), [data[offset:end].data], offset)
                if count <= 0:
                    raise OSError(f"{path} ended at byte {offset}, expected {size}")
                offset += count

        list(pool.map(read, range(0, size, _BLOCK)))
    return data


def made_in_huge_pages(make: Callable[..., _Made], *arguments: Any) -> _Made:
    """Return what ``make`` does, the largest memory that it allocates asking for huge pages.

    Who allocates has no option for it. Its memory is what the process has more of behind the call
    than in front of it; another thread's in the meantime is asked for too, which is harmless.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return make(*arguments)
    before = _anonymous()
    made = make(*arguments)
    pieces: list[tuple[int, int]] = []
    for start, end in _anonymous():  # which the system joins with what lies beside it
        inside = [(low, high) for low, high in before if low < end and start < high]
        edges = [start, *(edge for place in inside for edge in place), end]
        pieces += [(high - low, low) for low, high in zip(edges[::2], edges[1::2], strict=True)]
    # Smaller pieces are the allocator's own, for all that comes later.
    size, low = max(pieces, default=(0, 0))
    if size >= HUGE_PAGE:
        _C.madvise(ctypes.c_void_p(low), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return made


def _anonymous() -> list[tuple[int, int]]:
    """Return where the process has memory that no file is behind."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        place, mode, _, _, inode, *name = line.split(maxsplit=5)
        if inode == "0" and mode.startswith("rw") and not name:
            start, end = (int(part, 16) for part in place.split("-"))
            found.append((start, end))
    return found


_C = ctypes.CDLL(None)
