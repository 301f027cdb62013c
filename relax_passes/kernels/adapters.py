"""The kernels of LoRA adapters that stay apart, for a target."""

from __future__ import annotations

from typing import Any

from amx_tvm.errors import TargetError
from relax_passes.adapters import Parts

from .cpu import adapters as cpu


def down(parts: Parts, k: int, count: int, dtype: str, target: Any) -> Any:
    """Build t = x A^T, each row with its adapter's A.

    Raises
    ------
    TargetError
        The target has no such kernels.
    """
    _check(target)
    return cpu.down(parts, k, count, dtype)


def up(parts: Parts, count: int, dtype: str, gated: bool, target: Any) -> Any:
    """Build y + t B^T, each row with its adapter's B, or silu(gate) * up of that."""
    _check(target)
    return cpu.up(parts, count, dtype, gated)


def _check(target: Any) -> None:
    if target.kind.name != "llvm":
        raise TargetError(f"LoRA adapters stay apart on CPUs only, and the target is {target}")
