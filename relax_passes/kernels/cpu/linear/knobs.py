"""What a tuner may turn in the CPU kernels, with defaults that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.spec import LinearSpec


@dataclass(frozen=True)
class CpuKnobs:
    """Parameters of the CPU linears; none changes the result beyond the order of float32 sums.

    Attributes
    ----------
    prefetch : int
        Software prefetch distance in bytes of codes; 0 is none.
    rows : int
        Most rows of x per block of the kernel; 0 takes the instruction set's own sizes.
    merge_rows : int
        Rows of a block from which on a group's two scales are merged before it is multiplied.
    panel_rows : int
        Rows of x from which on a panel of W is decoded first and then used for all of them.
    panel_tiles, panel_block : int
        Row tiles of W and rows of x whose sums are held in registers at once.
    """

    prefetch: int = 4096
    rows: int = 0
    merge_rows: int = 4
    panel_rows: int = 32
    panel_tiles: int = 2
    panel_block: int = 8

    @staticmethod
    def of(
        knobs: Mapping[str, Any] | CpuKnobs | None,
        spec: LinearSpec | None = None,
        isa: Isa | None = None,
    ) -> CpuKnobs:
        """Read a mapping, the rest as a linear has it by default; unknown names are an error."""
        default = CpuKnobs() if spec is None else CpuKnobs.default(spec, isa or Isa())
        if knobs is None:
            return default
        if isinstance(knobs, CpuKnobs):
            return knobs
        known = {f.name for f in fields(CpuKnobs)}
        unknown = set(knobs) - known
        if unknown:
            raise ValueError(f"unknown CPU kernel knobs {sorted(unknown)}; known: {sorted(known)}")
        return replace(default, **knobs)

    @staticmethod
    def default(spec: LinearSpec, isa: Isa) -> CpuKnobs:
        """Return what a linear has without tuning.

        One row of eight-bit weights leaves the fetching to the hardware: eight more instructions
        for 512 bytes cost more than they bring (SmolLM2's head 0.91 to 0.95 of the time).
        """
        bytes_ = spec.format != "none" and spec.fmt.terms[0].table is None
        fetch = 0 if bytes_ and spec.m == 1 else CpuKnobs.prefetch
        panels = isa.panel_rows
        if spec.activation.integer and not bytes_ and spec.format != "none":
            panels = min(panels, isa.decoded_panel_rows)
        return CpuKnobs(prefetch=fetch, panel_rows=panels)

    def prefetch_tile(
        self,
        spec: LinearSpec,
        buffers: Mapping[str, Any],
        tile: Any,
        group: Any,
        level: int = 1,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Emit the prefetches of one group: codes ``prefetch`` bytes ahead and their scales.

        ``share`` (i, n) emits the i-th of n parts of them.
        """
        if not self.prefetch:
            return
        size, (part, parts) = spec.tile_code_bytes, share
        for line in range(part * 64, size, parts * 64):
            e.prefetch(buffers["w_codes"], tile, group, self.prefetch + line, level=level)
        ahead = self.prefetch * spec.tile_scale_bytes // size
        if part == 0:
            e.prefetch(buffers["w_scales"], tile, group, ahead, level=level)

    def blocks(self, sizes: Sequence[int], m: int | None) -> tuple[int, ...]:
        """Choose the row-block sizes out of an instruction set's list."""
        limit = self.rows or max(sizes)
        if m is not None:
            limit = min(limit, m)
        return tuple(s for s in sizes if s <= limit) or (1,)
