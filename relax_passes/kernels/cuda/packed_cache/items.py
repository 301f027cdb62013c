# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""How decode attention over rounded pages is divided on a GPU, and where its tables lie."""

from __future__ import annotations

from dataclasses import dataclass

from amx_tvm.targets.cuda.gpus import Gpu
from relax_passes.attention_spec import AttentionSpec
from relax_passes.kernels.cuda.attention.config import MOST_SEQUENCES, Heads, frequencies
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic

from .decode_text import ATTEND, PLAN
from .layout import Layout

WARPS = 4
FEW = 16  # sequences that are divided for one round only
SHORTEST = 48  # panels of an item
ROUNDS = 4
EXTRA = 12  # panels that are read as fast as a sequence's tokens in 16 bits
_BEGIN = 40  # panels that a block could attend to while it begins and ends
STAGES = (3, 2)  # panels that a warp has room for in shared memory: as many as fit
_ITEM = 32  # bytes


@dataclass(frozen=True)
class Items:
    """The division.

    Parameters
    ----------
    layout : Layout
        Of the cache.
    spec : AttentionSpec
        Any layer's: heads and their size are all layers'.
    windows : tuple of int
        The windows that layers have, 0 for none.
    gpu : Gpu
        What it is divided over.
    """

    layout: Layout
    spec: AttentionSpec
    windows: tuple[int, ...]
    gpu: Gpu

    @property
    def heads(self) -> Heads:
        """How heads are shared out to blocks."""
        return Heads(self.spec)

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
        """Warps of a block of few sequences, for which there are multiprocessors enough."""
        return 2 * WARPS if self._room(2 * WARPS, STAGES[-1]) <= self.gpu.shared_bytes else WARPS

    def stages(self, warps: int) -> int:
        """Panels that each warp of a block has room for in shared memory."""
        fitting = [n for n in STAGES if self._room(warps, n) <= self.gpu.shared_bytes]
        return (fitting or STAGES[-1:])[0]

    def _room(self, warps: int, stages: int) -> int:
        """Bytes of shared memory of a block, about."""
        return warps * stages * self.layout.panel_bytes + (12 << 10)

    def slots(self, warps: int) -> int:
        """Items that the multiprocessors hold at once, for each block of heads."""
        return max(1, self.resident(warps) * self.gpu.multiprocessors // self.heads.blocks)

    @property
    def items(self) -> int:
        """Most items."""
        return MOST_SEQUENCES + ROUNDS * self.slots(WARPS)

    def extra(self, warps: int) -> int:
        """Most items beyond one for each sequence; blocks without an item take time too."""
        return self.slots(warps) * (1 if warps == self.few_warps else ROUNDS)

    def items_at(self, kind: int) -> int:
        """Offset of a window's items in the tables, in bytes."""
        return kind * self.items * _ITEM

    @property
    def arrived_at(self) -> int:
        """Offset of the counts of parts that are done."""
        return self.items_at(len(self.windows))

    @property
    def parts_at(self) -> int:
        """Offset of the parts."""
        end = self.arrived_at + 4 * MOST_SEQUENCES * self.heads.blocks
        return -(-end // 16) * 16

    @property
    def bytes(self) -> int:
        """Bytes of the tables."""
        part = self.heads.group * (self.spec.head_dim + 2)
        return self.parts_at + 4 * self.items * self.heads.blocks * part

    def plan(self) -> Intrinsic:
        """Build the function that divides a step."""
        windows = ", ".join(map(str, self.windows))
        numbers = f"{self.heads.blocks}, {MOST_SEQUENCES}, {self.items}, {self.slots(WARPS)}"
        numbers += f", {self.slots(self.few_warps)}, {SHORTEST}, {ROUNDS}, {FEW}, {_BEGIN}, {EXTRA}"
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
