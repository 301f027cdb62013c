# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""How the attention of many sequences is divided on a GPU, and where the tables of a step lie.

Sequences are divided into items of pages or panels (``batch_text.py``, ``packed_cache/decode_text.py``).
Blocks of few sequences have more warps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from amx_tvm.targets.cuda.gpus import Gpu
from relax_passes.attention_spec import AttentionSpec

from .config import MOST_SEQUENCES, Heads

FEW = 16  # sequences that are divided for one round only
ROUNDS = 4
_ITEM = 32  # bytes


@dataclass(frozen=True)
class Division(ABC):
    """The division.

    Parameters
    ----------
    spec : AttentionSpec
        Any layer's: heads and their size are all layers'.
    windows : tuple of int
        The windows that layers have, 0 for none.
    gpu : Gpu
        What it is divided over.
    """

    spec: AttentionSpec
    windows: tuple[int, ...]
    gpu: Gpu

    warps: ClassVar[int]  # of a block
    begin: ClassVar[int] = 0  # bytes in front of the items

    @property
    @abstractmethod
    def few_warps(self) -> int:
        """Warps of a block of few sequences."""

    @abstractmethod
    def resident(self, warps: int) -> int:
        """Blocks of so many warps that a multiprocessor holds."""

    @property
    def heads(self) -> Heads:
        """How heads lie in pages and blocks."""
        return Heads(self.spec)

    def slots(self, warps: int) -> int:
        """Items that the multiprocessors hold at once, for each block of heads."""
        return max(1, self.resident(warps) * self.gpu.multiprocessors // self.heads.blocks)

    @property
    def items(self) -> int:
        """Most items."""
        return MOST_SEQUENCES + ROUNDS * self.slots(self.warps)

    def extra(self, warps: int) -> int:
        """Most items beyond one for each sequence; blocks without an item take time too."""
        return self.slots(warps) * (1 if warps == self.few_warps else ROUNDS)

    def items_at(self, kind: int) -> int:
        """Offset of a window's items in the tables, in bytes."""
        return self.begin + kind * self.items * _ITEM

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
    def parts_end(self) -> int:
        """Offset of what lies behind the parts."""
        parts = self.items * self.heads.blocks * self.heads.group * (self.heads.stored + 2)
        return self.parts_at + 4 * parts

    def sizes(self, shortest: int, begin: int) -> str:
        """Template arguments of the kernel that divides; of `DIVIDE`, among others."""
        few, many = self.slots(self.few_warps), self.slots(self.warps)
        return (
            f"{self.heads.blocks}, {MOST_SEQUENCES}, {self.items}, {many}, {few}, {shortest}, "
            f"{ROUNDS}, {FEW}, {begin}"
        )


# CUDA text of a kernel's middle: from the pages of each thread's sequence to its number of items
# and their end, by the division that takes the fewest pages a round.
DIVIDE = r"""    pages_of[tid] = pages;
    amx_until(pages, sums, tid);
    const int rounds = rows <= FEW ? 1 : ROUNDS;
    if (tid < 32 * rounds) {  // a warp looks at the items of a number of rounds
      const int slots = rows <= FEW ? FEW_SLOTS : SLOTS * (tid / 32 + 1), item = max(SHORTEST, (sums[255] + slots - 1) / slots);
      int count = 0, longest = 0;
      for (int r = tid & 31; r < n; r += 32) {
        const int splits = amx_splits(pages_of[r], item);
        count += splits;
        longest = max(longest, (pages_of[r] + splits - 1) / splits);
      }
      count = __reduce_add_sync(0xffffffffu, count);
      longest = __reduce_max_sync(0xffffffffu, longest);
      size[tid / 32] = item;
      cost[tid / 32] = (count + SLOTS - 1) / SLOTS * (longest + BEGIN);
    }
    __syncthreads();
    int best = 0;
    for (int i = 1; i < rounds; ++i) best = cost[i] < cost[best] ? i : best;
    const int item = size[best], splits = tid < n ? amx_splits(pages, item) : 0;
    const int until = amx_until(splits, sums, tid);
"""
