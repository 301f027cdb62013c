"""Knobs of the tile schedule (picture: tile.py)."""

from __future__ import annotations

from dataclasses import dataclass

from amx_tvm.targets.cuda.gpus import Gpu

STAGE_BYTES = 128  # of a row of x in a stage: 64 columns of float16, 128 of E4M3


@dataclass(frozen=True)
class TileKnobs:
    """Free choices of the schedule.

    block_m : rows of x in a block: 8, 16, 32, 64, 128 or 256
    groups : groups of four warps (64 rows of W each) in a block
    stages : slots of the ring; with wgmma an even number
    cluster : blocks that split K (sm_90 and later)
    share : blocks that request x together (wgmma); divides block_m / 8
    parallel : steps of 16 columns that are decoded and multiplied together (wgmma): 1 or 2
    producer : a warp of its own requests the stages (wgmma). With 256 rows of x it is a warpgroup
        that cedes its registers to the others
    persistent : one block a multiprocessor walks over tiles (tile_persistent; wgmma with a
        producer, cluster 1); any number of stages
    wgmma : take the asynchronous tensor core instruction and the copy engine (sm_90a)
    dependent : programmatic dependent launch (sm_90 and later)
    e4m3 : multiply x rounded to E4M3 by W decoded to E4M3 (wgmma; layout "cuda-fragment-e4m3")
    """

    block_m: int = 64
    groups: int = 2
    stages: int = 4
    cluster: int = 1
    share: int = 1
    parallel: int = 1
    producer: bool = False
    persistent: bool = False
    wgmma: bool = True
    dependent: bool = False
    e4m3: bool = False

    @property
    def columns(self) -> int:
        """Columns of a stage; four steps of products."""
        return STAGE_BYTES if self.e4m3 else STAGE_BYTES // 2

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.groups * 4 + (0 if not self.producer else 4 if self.cedes else 1)

    @property
    def cedes(self) -> bool:
        """Whether registers move from the producer to the consumers."""
        return self.producer and self.block_m == 256

    def registers(self, gpu: Gpu) -> tuple[int, int]:
        """Registers of a producer's and of a consumer's lane where they move."""
        fewer, lanes = 40, self.warps * 32
        at_launch = gpu.registers // lanes // 8 * 8
        left = (at_launch * lanes - fewer * 128) // (self.groups * 128) // 8 * 8
        return fewer, min(left, 232)
