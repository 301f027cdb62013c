"""What a schedule rule is, and the part of a target that rules look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import tvm
from tvm.target import Target, codegen

from amx_tvm.targets.cuda.gpus import GPUS, Gpu
from amx_tvm.targets.cuda.target import gpu_of
from relax_passes.spec import LinearSpec


@dataclass(frozen=True)
class TargetInfo:
    """The facts about a target that decide which rule applies.

    Attributes
    ----------
    kind : str
        TVM target kind, "llvm" or "cuda".
    arch : str
        "x86-64", "aarch64" or the triple's first part for others; "sm_90a" and so on for cuda.
    features : frozenset of str
        LLVM feature names without signs, such as "avx512vnni" or "dotprod".
    gpu : Gpu or None
        Facts of the GPU, for kind "cuda" and an architecture that the kernels know.
    """

    kind: str
    arch: str
    features: frozenset[str]
    gpu: Gpu | None = None

    def has(self, *names: str) -> bool:
        """Whether all the named features are there."""
        return self.features.issuperset(names)

    @staticmethod
    def of(target: Target | TargetInfo | Mapping | str) -> TargetInfo:
        """Read the facts off a TVM target (or pass an existing TargetInfo through)."""
        if isinstance(target, TargetInfo):
            return target
        target = target if isinstance(target, Target) else Target(target)
        kind = target.kind.name
        if kind == "cuda":
            arch = str(target.attrs.get("arch", ""))
            gpu = gpu_of(target) if arch in GPUS else None
            return TargetInfo("cuda", arch, frozenset(), gpu)
        if kind != "llvm":
            return TargetInfo(kind, kind, frozenset())
        triple = str(target.attrs.get("mtriple", codegen.llvm_get_system_triple()))
        arch = triple.split("-")[0]
        arch = {"x86_64": "x86-64", "amd64": "x86-64", "arm64": "aarch64"}.get(arch, arch)
        features = frozenset(str(f) for f in codegen.llvm_get_cpu_features(target))
        return TargetInfo(kind, arch, features)


class RowRange(NamedTuple):
    """Which kernel a function runs from so many rows of x on, and what it does in words."""

    first: int
    kernel: str
    why: str


class Rule(Protocol):
    """A way to build the kernel of a linear for some kind of hardware."""

    name: str

    def apply(
        self, spec: LinearSpec, target: TargetInfo, knobs: Mapping[str, Any] | None = None
    ) -> tvm.tirx.PrimFunc | None:
        """Build the kernel, or return None when the linear or the target is not this rule's."""

    def rows(
        self, spec: LinearSpec, target: TargetInfo, knobs: Mapping[str, Any] | None = None
    ) -> tuple[RowRange, ...]:
        """List which kernels the function runs, by rising number of rows of x."""

    def why(self, spec: LinearSpec, target: TargetInfo) -> str:
        """Say in a few words what the kernel does and why it was chosen."""
