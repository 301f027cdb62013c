"""The CPU rules: which instruction set a target gets, and the kernel for each activation type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm

from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.chain import ChainSpec
from relax_passes.spec import LinearSpec

from .isa.avx2 import Avx2, AvxVnni
from .isa.avx512 import Avx512
from .isa.base import Isa
from .isa.neon import Neon, NeonDot
from .knobs import CpuKnobs
from .linear_chain import linear_chain
from .linear_dense import linear_dense
from .linear_float32 import linear_float32
from .linear_integer import linear_integer


class CpuRule:
    """One instruction set; applies when the target has its features."""

    def __init__(self, isa: Isa, arch: str, features: tuple[str, ...]):
        self.isa, self.arch, self.features = isa, arch, features
        self.name = isa.name

    def apply(
        self, spec: LinearSpec, target: TargetInfo, knobs: Mapping[str, Any] | None = None
    ) -> tvm.tirx.PrimFunc | None:
        """Build the kernel, or None when the target lacks the features."""
        if not self._fits(target):
            return None
        if spec.format == "none":
            build = linear_dense
        else:
            build = linear_float32 if spec.activation.exact else linear_integer
        return build(spec, self.isa.on(target), CpuKnobs.of(knobs, spec))

    def chain(
        self,
        spec: ChainSpec,
        target: TargetInfo,
        knobs: Sequence[Mapping[str, Any] | None],
    ) -> tvm.tirx.PrimFunc | None:
        """Build the kernel of a chain, or None when the target lacks the features."""
        if not self._fits(target):
            return None
        each = tuple(CpuKnobs.of(k, s) for k, s in zip(knobs, spec.stages, strict=True))
        return linear_chain(spec, self.isa.on(target), each)

    def _fits(self, target: TargetInfo) -> bool:
        arch_fits = self.arch in ("", target.arch)
        return target.kind == "llvm" and arch_fits and target.has(*self.features)

    def why(self, spec: LinearSpec, target: TargetInfo) -> str:
        """Say what was chosen and for which features."""
        needs = ", ".join(self.features) or "no special features"
        return f"{self.isa.doc} ({needs}); activations {spec.activation}"


CPU_RULES = (
    CpuRule(Avx512(), "x86-64", ("avx512bw", "avx512vnni", "avx512vbmi")),
    CpuRule(AvxVnni(), "x86-64", ("avx2", "fma", "avxvnni")),
    CpuRule(Avx2(), "x86-64", ("avx2", "fma")),
    CpuRule(NeonDot(), "aarch64", ("neon", "dotprod")),
    CpuRule(Neon(), "aarch64", ("neon",)),
    CpuRule(Isa(), "", ()),
)
