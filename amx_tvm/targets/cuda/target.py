"""TVM targets for GPUs: from a name to a target, and from a target to the facts of its GPU.

    "sm_90a"                architecture
    "sm_80+sm_89+sm_90a"    several in one artifact, scheduled for the one that can least
    "sm_90a/114"            a GPU with 114 multiprocessors

TVM 0.27's targets have no attribute for other architectures or for multiprocessors (and refuse
unknown ones): both travel in a target's keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amx_tvm.errors import TargetError

from .driver import gpus_here
from .gpus import Gpu, gpu

_ALSO, _MULTIPROCESSORS = "also-", "multiprocessors-"  # beginnings of keys


def several(names: str) -> list[str]:
    """Split "sm_80+sm_89" into architectures, the one to schedule for first.

    One schedule has to fit all: the one with the least shared memory and the fewest instructions.

    Raises
    ------
    TargetError
        For an unknown architecture.
    """
    gpus = [gpu(name) for name in dict.fromkeys(names.split("+"))]
    least = min(gpus, key=lambda g: (g.clusters, g.wgmma, g.shared_bytes, g.number))
    return [least.arch, *(g.arch for g in gpus if g is not least)]


def target(name: str | None = None, host: dict | None = None):  # noqa: ANN201 - tvm.target.Target
    """TVM target for a name of the module's docstring, with the limits that scheduling needs.

    Parameters
    ----------
    name : str, optional
        Architectures, and multiprocessors where they are not the first architecture's usual ones;
        the GPU of this machine when there is none.
    host : dict, optional
        TVM's description of the host processor; the machine's own by default.

    Raises
    ------
    TargetError
        For an unknown architecture, multiprocessors that are no number, or no name and no GPU here.
    """
    name = _name_here() if name is None else name
    archs, slash, count = name.partition("/")
    first, *others = several(archs)
    keys = ["cuda", "gpu", *(_ALSO + other for other in others)]
    if slash:
        if not count.isdecimal() or not int(count):
            raise TargetError(
                f"target 'cuda:{name}' has {count!r} multiprocessors; expected a number, for "
                "example target='cuda:sm_90a/132'"
            )
        keys.append(_MULTIPROCESSORS + count)
    from tvm.target import Target  # a wrong name has been refused without TVM

    config = {
        "kind": "cuda",
        "arch": first,
        "keys": keys,
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": 49152,
        "thread_warp_size": 32,
        "registers_per_block": gpu(first).registers,
        "l2_cache_size_bytes": gpu(first).l2_bytes,
    }
    return Target(config, host=host or {"kind": "llvm"})


def _name_here() -> str:
    """Name of the first GPU of this machine."""
    found = gpus_here()
    if not found:
        raise TargetError(
            "target 'cuda' means the GPU of this machine, and there is none; name an "
            "architecture, for example target='cuda:sm_90a'"
        )
    arch = "sm_" + found[0].capability.replace(".", "")
    arch = {"sm_90": "sm_90a"}.get(arch, arch)
    count = found[0].multiprocessors
    return arch if count == gpu(arch).multiprocessors else f"{arch}/{count}"


def architectures_of(target: Any) -> tuple[str, ...]:
    """Architectures that a TVM target's code is for, the one it is scheduled for first."""
    return (str(target.attrs["arch"]), *_keys(target, _ALSO))


def gpu_of(target: Any) -> Gpu:
    """Facts of the GPU that a TVM target is scheduled for; its own attributes come first.

    Raises
    ------
    TargetError
        For an architecture that the kernels do not know.
    """
    attrs, facts = target.attrs, gpu(str(target.attrs.get("arch", "")))
    count = _keys(target, _MULTIPROCESSORS)
    return replace(
        facts,
        multiprocessors=int(count[0]) if count else facts.multiprocessors,
        l2_bytes=int(attrs.get("l2_cache_size_bytes", facts.l2_bytes)),
        registers=int(attrs.get("registers_per_block", facts.registers)),
    )


def name_of(target: Any) -> str:
    """Name of a TVM target, as `target` takes it."""
    return "/".join(["+".join(architectures_of(target)), *_keys(target, _MULTIPROCESSORS)])


def _keys(target: Any, beginning: str) -> tuple[str, ...]:
    keys = (str(key) for key in target.keys)
    return tuple(key.removeprefix(beginning) for key in keys if key.startswith(beginning))
