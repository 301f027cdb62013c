# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""How decode attention over rounded pages is divided on a GPU, and where its tables lie."""

from __future__ import annotations

from dataclasses import dataclass

from relax_passes.attention_spec import AttentionSpec
from relax_passes.kernels.cuda.attention.config import frequencies
from relax_passes.kernels.cuda.attention.division import Division
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic

from .decode_text import ATTEND, PLAN
from .layout import Layout

WARPS = 4
SHORTEST = 48  # panels of an item
EXTRA = 12  # panels that are read as fast as a sequence's tokens in 16 bits
_BEGIN = 40  # panels that a block could attend to while it begins and ends
STAGES = (3, 2)  # panels that a warp has room for in shared memory: as many as fit


@dataclass(frozen=True)
class Items(Division):
    """The division of panels.

    Parameters
    ----------
    layout : Layout
        Of the cache.
    """

    layout: Layout

    warps = WARPS

    def resident(self, warps: int) -> int:
        """Blocks of so many warps that a multiprocessor holds."""
        rows = -(-self.heads.group // 8) * 8
        if self.spec.head_dim * rows > 1024 or self.layout.format.code_bits == 8:
            most = 8
        else:
            most = 16 if self.heads.group <= 4 else 12
        shared = self.gpu.shared_bytes // (4 * self.shared_floats(self.spec, warps))
        return max(1, min(most // warps, shared))

    @property
    def few_warps(self) -> int:
        """Warps of a block of few sequences: many, for there are multiprocessors enough."""
        fits = self._room(2 * WARPS, STAGES[-1]) <= self.gpu.shared_bytes
        return 2 * WARPS if fits else WARPS // 2

    def stages(self, warps: int) -> int:
        """Panels that each warp of a block has room for in shared memory."""
        fitting = [n for n in STAGES if self._room(warps, n) <= self.gpu.shared_bytes]
        return (fitting or STAGES[-1:])[0]

    def _room(self, warps: int, stages: int) -> int:
        """Bytes of shared memory of a block, about."""
        return warps * stages * self.layout.panel_bytes + (12 << 10)

    @property
    def bytes(self) -> int:
        """Bytes of the tables."""
        return self.parts_end

    def plan(self) -> Intrinsic:
        """Build the function that divides a step."""
        windows = ", ".join(map(str, self.windows))
        numbers = f"{self.sizes(SHORTEST, _BEGIN)}, {EXTRA}"
        numbers += f", {self.layout.spec.newest}, {self.layout.spec.first}"
        return Intrinsic(
            f"amx_packed_plan_{self.heads.blocks}_{len(self.windows)}",
            f"""
  const int windows[] = {{{windows}}};
  amx_packed_plan<{numbers}>((const AmxPacked*)state, windows, {len(self.windows)}, {self.arrived_at}, rows, tid);""",
            (PLAN,),
            "void(const void* state, int rows, int tid)",
        )

    def attend(self, spec: AttentionSpec, warps: int) -> Intrinsic:
        """Build the function of one block of a layer's attention, of so many warps."""
        turns, half, layout = frequencies(spec.rotation), spec.rotation.pairs, self.layout
        sinks, given = ("sinks", "const void* sinks, ") if spec.sinks else ("nullptr", "")
        kind = self.windows.index(spec.window)
        dependent = "true" if self.gpu.clusters else "false"
        numbers = f"{layout.numbers}, {layout.place}, {self.heads.group}, {self.heads.parts}"
        numbers += f", {self.items}, {warps}, {self.stages(warps)}, {half}, {dependent}"
        return Intrinsic(
            f"amx_attend_packed_{turns.name}_{self.heads.name}_{kind}_{warps}"
            + "_sinks" * spec.sinks,
            f"""
  amx_attend_packed<{numbers}>(shared, qkv, state, out, {sinks}, {turns.name}, {spec.rotation.factor!r}f, {self.items_at(kind)},
                               {self.arrived_at}, {self.parts_at}, layer, scale, cap, {spec.window}, number, head, warp, lane);""",
            (ATTEND, turns),
            f"void(float* shared, const void* qkv, const void* state, {given}void* out, int layer, "
            "float scale, float cap, int number, int head, int warp, int lane)",
        )

    def shared_floats(self, spec: AttentionSpec, warps: int) -> int:
        """Floats of shared memory that ``amx_attend_packed`` lays out."""
        d, group = spec.head_dim, self.heads.group
        rows = -(-group // 8) * 8
        room = max(self.stages(warps) * self.layout.panel_bytes // 4, group * d)
        return rows * (d + 8) // 2 + 2 * spec.rotation.pairs + warps * (room + 2 * group) + 1
