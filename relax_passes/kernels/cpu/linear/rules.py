"""Which kernel a CPU linear runs, by its number of rows of x.

An instruction set is chosen by the target's features. Then every kernel is asked from how many
rows of x on it is this linear's:

    dense        float32 weights (format "none")
    float32      exact x, decoded weights
    direct       integer or four-bit x: a tile is decoded again for every block of rows
    merged       a group of W is decoded once for a block of rows of int8 x, to bytes
    merged-words the same, to 16-bit words
    merged-bytes the same, to signed bytes, on Arm
    panel-int8   a panel of W becomes bytes, then is used for all rows of int8 x
    panel-words  a panel of W becomes 16-bit words, and so does x, for vectors of eight rows
    panel-terms  a panel of bytes, with the terms of W apart, for vectors of eight rows
    panel-bytes  a panel of signed bytes for all rows, on Arm's dot products
    panel-w4a4   the same for four-bit x, without rounding
    panel-bf16   both operands of W4A4 as bf16, for groups that are no bytes
    panel-float32  a panel of W becomes float32, for exact x and vectors of eight rows

The first three are whole kernels, the merged ones take blocks of the direct one, and a panel takes
the place of both. `rows` lists what a linear runs; `amx-tvm inspect` prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tvm

from relax_passes.activation import Activation, Scheme
from relax_passes.kernels.base import RowRange, TargetInfo
from relax_passes.kernels.chain import ChainSpec
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu import fp4_integers
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx2 import Avx2, AvxVnni
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.isa.neon import Neon, NeonDot, NeonMatrix
from relax_passes.spec import LinearSpec

from . import (
    dense,
    direct,
    float32,
    merged,
    merged_bytes,
    merged_words,
    panel_bf16,
    panel_bytes,
    panel_float32,
    panel_int8,
    panel_terms,
    panel_w4a4,
    panel_words,
)
from .chain import linear_chain
from .knobs import CpuKnobs
from .rows import either

# From how many rows of x on a kernel is a linear's; None where it never is.
FromRows = Callable[[LinearSpec, Any, CpuKnobs], "int | None"]
# Emits a whole linear for M rows: (spec, isa, knobs, buffers, M).
Emit = Callable[[LinearSpec, Any, CpuKnobs, Any, Expr], None]


@dataclass(frozen=True)
class RowKernel:
    """One kernel: its name, its rule, what it does in words, and what emits it."""

    name: str
    from_rows: FromRows
    why: str
    emit: Emit


DENSE = RowKernel("dense", dense.from_rows, "float32 weights", dense.emit_dense)
FLOAT32 = RowKernel("float32", float32.from_rows, "exact x, float32 products", float32.emit_float32)
DIRECT = RowKernel("direct", direct.from_rows, "decoded for each block of rows", direct.emit_direct)
BLOCKS = (
    RowKernel("merged", merged.from_rows, "decoded once a block of rows", direct.emit_direct),
    RowKernel("merged-words", merged_words.from_rows, "words of a block", direct.emit_direct),
    RowKernel("merged-bytes", merged_bytes.from_rows, "bytes of a block", direct.emit_direct),
)
PANELS = (
    RowKernel("panel-int8", panel_int8.from_rows, "bytes for all rows", panel_int8.emit_panel),
    RowKernel("panel-words", panel_words.from_rows, "words for all rows", panel_words.emit_panel),
    RowKernel("panel-terms", panel_terms.from_rows, "terms for all rows", panel_terms.emit_panel),
    RowKernel("panel-bytes", panel_bytes.from_rows, "bytes for all rows", panel_bytes.emit_panel),
    RowKernel("panel-w4a4", panel_w4a4.from_rows, "exact bytes for all rows", panel_w4a4.emit_w4a4),
    RowKernel(
        "panel-float32", panel_float32.from_rows, "floats for all rows", panel_float32.emit_panel
    ),
    RowKernel("panel-bf16", panel_bf16.from_rows, "bf16 for all rows", panel_bf16.emit_bf16),
)
WHOLE = (DENSE, FLOAT32, DIRECT)


def chosen(
    kernels: Sequence[RowKernel], spec: LinearSpec, isa: Isa, knobs: CpuKnobs
) -> tuple[int, RowKernel] | None:
    """Return the first kernel whose rule answers, and from how many rows on."""
    for kernel in kernels:
        first = kernel.from_rows(spec, isa, knobs)
        if first is not None:
            return first, kernel
    return None


def linear(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> tvm.tirx.PrimFunc:
    """Build the function of a linear; its arguments are ``spec.buffers()``."""
    whole, many = (chosen(kernels, spec, isa, knobs) for kernels in (WHOLE, PANELS))
    assert whole is not None, f"every linear has a kernel, but none is for {spec}"
    kind = spec.activation.name if whole[1] is DIRECT else whole[1].name
    with e.function(f"linear_{kind}", spec.buffers(), spec.m) as (buffers, m):
        few = partial(whole[1].emit, spec, isa, knobs, buffers, m)
        if many is None:
            few()
        else:
            either(m, spec, many[0], few, partial(many[1].emit, spec, isa, knobs, buffers, m))
    return buffers["func"]


def rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> tuple[RowRange, ...]:
    """List which kernels a linear runs, by rising number of rows of x."""
    found = [chosen(kernels, spec, isa, knobs) for kernels in (WHOLE, BLOCKS, PANELS)]
    kept: dict[int, RowKernel] = {}
    for first, kernel in (f for f in found if f is not None):
        kept = {at: other for at, other in kept.items() if at < first} | {first: kernel}
    if spec.m is not None:
        at = max(first for first in kept if first <= spec.m)
        kept = {at: kept[at]}
    most = spec.m or spec.m_max
    return tuple(RowRange(a, k.name, k.why) for a, k in kept.items() if not most or a <= most)


class CpuRule:
    """One instruction set; applies when the target has its features."""

    def __init__(self, isa: Isa, arch: str, features: tuple[str, ...]):
        self.isa, self.arch, self.features = isa, arch, features
        self.name = isa.name

    def apply(
        self, spec: LinearSpec, target: TargetInfo, knobs: Mapping[str, Any] | None = None
    ) -> tvm.tirx.PrimFunc | None:
        """Build the kernel, or None when the target lacks the features."""
        if not self.fits(target):
            return None
        return linear(spec, self.isa.on(target), CpuKnobs.of(knobs, spec, self.isa))

    def chain(
        self,
        spec: ChainSpec,
        target: TargetInfo,
        knobs: Sequence[Mapping[str, Any] | None],
    ) -> tvm.tirx.PrimFunc | None:
        """Build the kernel of a chain, or None when the target lacks the features."""
        if not self.fits(target):
            return None
        each = tuple(CpuKnobs.of(k, s, self.isa) for k, s in zip(knobs, spec.stages, strict=True))
        return linear_chain(spec, self.isa.on(target), each)

    def fits(self, target: TargetInfo) -> bool:
        """Whether a target has the features."""
        arch_fits = self.arch in ("", target.arch)
        return target.kind == "llvm" and arch_fits and target.has(*self.features)

    def rows(
        self, spec: LinearSpec, target: TargetInfo, knobs: Mapping[str, Any] | None = None
    ) -> tuple[RowRange, ...]:
        """List which kernels the function runs."""
        return rows(spec, self.isa.on(target), CpuKnobs.of(knobs, spec, self.isa))

    def why(self, spec: LinearSpec, _target: TargetInfo) -> str:
        """Say what was chosen and for which features."""
        needs = ", ".join(self.features) or "no special features"
        return f"{self.isa.doc} ({needs}); activations {spec.activation}"


CPU_RULES = (
    CpuRule(Avx512(), "x86-64", ("avx512bw", "avx512vnni", "avx512vbmi")),
    CpuRule(AvxVnni(), "x86-64", ("avx2", "fma", "avxvnni")),
    CpuRule(Avx2(), "x86-64", ("avx2", "fma")),
    CpuRule(NeonMatrix(), "aarch64", ("neon", "dotprod", "i8mm")),
    CpuRule(NeonDot(), "aarch64", ("neon", "dotprod")),
    CpuRule(Neon(), "aarch64", ("neon",)),
    CpuRule(Isa(), "", ()),
)


def isa_of(target: TargetInfo) -> Isa:
    """Return the instruction set that a target's features choose."""
    return next(rule.isa for rule in CPU_RULES if rule.fits(target))


def read_as(activation: Activation, target: TargetInfo) -> Activation:
    """Return what linears on a target read in place of an activation.

    Four-bit x of a CPU without kernels of its own for them comes as integers, so that it has those
    of int8 x.
    """
    if target.kind != "llvm" or activation.scheme is not Scheme.FOUR_BIT:
        return activation
    joined = isa_of(target).joined_signs and fp4_integers.supports(activation.fmt)
    return replace(activation, outliers=joined)
