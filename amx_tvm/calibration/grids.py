"""The storable numbers of a format as torch grids: what GPTQ and the scale search round to.

A `Grid` knows, for a block of one group of every row [N, group], which stored scales are worth
trying, and rounds single columns under chosen scales. Scales are handled in stored form (bytes),
so whatever a search chooses is what the file holds; nothing is rounded a second time.

    E2M1 formats   candidates are the neighbours of the plain rule's byte: an 8-bit float's byte
                   order is its value's order. A pair's two signs are searched apart, because a
                   positive value never meets the negative scale.
    int4           candidates shrink the range at either end; scale and zero point go together.
    int8           the format's own scale, or one a little smaller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from amx_tvm import formats
from amx_tvm.calibration.fake import quotient, round_magnitude
from amx_tvm.errors import CalibrationError
from amx_tvm.formats import Format, Quantized

Scales = tuple[Tensor, ...]


class Grid(ABC):
    """Scale candidates and rounding of one format for the weight that `prepare` was given."""

    def __init__(self, fmt: Format) -> None:
        self.format = fmt
        self.group_size = fmt.group_size
        self.tensor_scale: np.ndarray | None = None

    def prepare(self, weight: Tensor) -> None:
        """Fix the tensor scale, where the format has one, from a weight [N, K]."""
        if self.format.row_scaled:
            largest = np.asarray(weight.abs().max().item(), np.float32)
            self.tensor_scale = np.asarray(self.format.tensor_scale_of(largest), np.float32)

    @abstractmethod
    def plain(self, block: Tensor) -> Scales:
        """Stored scales [N] of a block [N, group] by the format's own rule."""

    @abstractmethod
    def search(self, block: Tensor, weight: Tensor) -> Scales:
        """Stored scales [N] that minimize the squared error weighted by `weight`.

        weight : [group], or one for each row [N, group]
        """

    @abstractmethod
    def joint(self, block: Tensor, weight: Tensor, keep: int) -> Scales:
        """Promising scale sets [C, N] for a search that measures every one of them itself."""

    @abstractmethod
    def round(self, column: Tensor, scales: Scales) -> Tensor:
        """Round values to the grid; `scales` broadcast against them. Returns values."""

    def quantized(self, values: Tensor, scales: Scales) -> Quantized:
        """Pack rounded values [N, K] and their scales [N, groups] into the format's own object."""
        stored = {
            tensor.name: part.cpu().numpy().astype(self.format.scale_tensor(tensor.name).dtype)
            for tensor, part in zip(self.format.scale_tensors, scales, strict=True)
        }
        rows, columns = values.shape
        groups = scales[0].shape[1]
        padded = np.zeros((rows, groups * self.group_size), np.float32)
        padded[:, :columns] = values.cpu().numpy()
        scale = None
        if self.tensor_scale is not None:
            scale = np.broadcast_to(self.tensor_scale, (rows, 1))
        codes = self.format.encode(padded.reshape(rows, groups, -1), stored, scale)
        codes = np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns])
        return Quantized(codes, stored, self.format, self.tensor_scale)


class E2M1Grid(Grid):
    """The E2M1 formats, with a scale pair or one scale."""

    def __init__(self, fmt: Format, below: int, above: int) -> None:
        super().__init__(fmt)
        kind = fmt.scale_tensors[0].type
        self.table = torch.from_numpy(kind.decode(np.arange(kind.largest + 1, dtype=np.uint8)))
        self.largest = kind.largest
        self.pair = len(fmt.scale_tensors) == 2
        self.deltas = torch.arange(-below, above + 1)

    def prepare(self, weight: Tensor) -> None:
        """Fix the tensor scale and with it the values of all stored scales."""
        super().prepare(weight)
        self.values = self.table.to(weight.device)
        if self.tensor_scale is not None:
            self.values = self.values * float(self.tensor_scale)

    def plain(self, block: Tensor) -> Scales:
        """Stored scales by the format's rule."""
        high, depth = (part.amax(1) for part in (block.clamp(min=0), (-block).clamp(min=0)))
        scale = None
        if self.tensor_scale is not None:
            scale = np.broadcast_to(self.tensor_scale, (len(block), 1))
        extrema = [part.cpu().numpy()[:, None] for part in (high, depth)]
        stored = self.format.group_scales(extrema[0], extrema[1], scale)
        return tuple(
            torch.from_numpy(stored[t.name][:, 0].astype(np.int64)).to(block.device)
            for t in self.format.scale_tensors
        )

    def _parts(self, block: Tensor) -> list[Tensor]:
        """Magnitudes that each scale is responsible for."""
        return [block.clamp(min=0), (-block).clamp(min=0)] if self.pair else [block.abs()]

    def _ranked(self, block: Tensor, weight: Tensor, keep: int) -> list[Tensor]:
        """For each scale tensor the `keep` best stored scales [N, keep], best first."""
        ranked = []
        for base, part in zip(self.plain(block), self._parts(block), strict=True):
            stored = (base[:, None] + self.deltas.to(base.device)).clamp(0, self.largest)
            stored = torch.where(base[:, None] > 0, stored.clamp(min=1), stored * 0)
            scale = self.values[stored][..., None]
            rounded = round_magnitude(quotient(part[:, None], scale)) * scale
            error = ((rounded - part[:, None]).square() * weight[..., None, :]).sum(-1)
            ranked.append(stored.gather(1, error.argsort(dim=1, stable=True)[:, :keep]))
        return ranked

    def search(self, block: Tensor, weight: Tensor) -> Scales:
        """Best neighbour of the plain rule's byte, each sign by itself."""
        return tuple(best[:, 0] for best in self._ranked(block, weight, 1))

    def joint(self, block: Tensor, weight: Tensor, keep: int) -> Scales:
        """All combinations of the `keep` best scales of each sign."""
        ranked = [best.T for best in self._ranked(block, weight, keep)]
        if not self.pair:
            return (ranked[0].contiguous(),)
        first = ranked[0].repeat_interleave(len(ranked[1]), dim=0)
        return first, ranked[1].repeat(len(ranked[0]), 1)

    def round(self, column: Tensor, scales: Scales) -> Tensor:
        """Round to E2M1 times the scale of the value's sign."""
        positive, negative = self.values[scales[0]], self.values[scales[-1]]
        scale = torch.where(column > 0, positive, negative)
        rounded = round_magnitude(quotient(column.abs(), scale)) * scale
        return torch.where(column > 0, rounded, -rounded)


class IntGrid(Grid):
    """int4: a float16 scale and an integer zero point."""

    SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)

    @staticmethod
    def _range(block: Tensor) -> tuple[Tensor, Tensor]:
        """How far each row reaches over and under 0, [N] each."""
        return block.amax(1).clamp(min=0), (-block).amax(1).clamp(min=0)

    def _of_range(self, high: Tensor, depth: Tensor) -> Scales:
        stored = self.format.group_scales(high.cpu().numpy(), depth.cpu().numpy(), None)
        names = [tensor.name for tensor in self.format.scale_tensors]
        return tuple(torch.from_numpy(stored[name]).to(high.device) for name in names)

    def plain(self, block: Tensor) -> Scales:
        """Scale and zero point of the block's range."""
        return self._of_range(*self._range(block))

    def _ranked(self, block: Tensor, weight: Tensor, keep: int) -> Scales:
        high, depth = self._range(block)
        sets = [self._of_range(high * a, depth * b) for a in self.SHRINK for b in self.SHRINK]
        errors = [
            ((self.round(block, (s[:, None], z[:, None])) - block).square() * weight).sum(1)
            for s, z in sets
        ]
        order = torch.stack(errors).argsort(dim=0, stable=True)[:keep]
        return tuple(torch.stack(part).gather(0, order) for part in zip(*sets, strict=True))

    def search(self, block: Tensor, weight: Tensor) -> Scales:
        """Best of 36 shrunken ranges."""
        return tuple(part[0] for part in self._ranked(block, weight, 1))

    def joint(self, block: Tensor, weight: Tensor, keep: int) -> Scales:
        """The `keep` squared best ranges."""
        return self._ranked(block, weight, keep * keep)

    def round(self, column: Tensor, scales: Scales) -> Tensor:
        """Round to the integers 0..15 around the zero point."""
        scale, zero = scales[0].float(), scales[1].float()
        steps = torch.round(quotient(column, scale)) + zero
        return (steps.clamp(0, 15) - zero) * scale


class ByteGrid(Grid):
    """int8: symmetric integers under a float16 scale."""

    SHRINK = (1.0, 0.98, 0.95)

    def _of(self, largest: Tensor) -> Scales:
        host = largest.cpu().numpy()
        stored = self.format.group_scales(host, host, None)
        return (torch.from_numpy(stored["scale"]).to(largest.device),)

    def plain(self, block: Tensor) -> Scales:
        """Scale of the block's largest magnitude."""
        return self._of(block.abs().amax(1))

    def joint(self, block: Tensor, weight: Tensor, keep: int) -> Scales:
        """The scales, best first."""
        largest = block.abs().amax(1)
        sets = torch.stack([self._of(largest * part)[0] for part in self.SHRINK])
        errors = ((self.round(block, (sets[..., None],)) - block).square() * weight).sum(-1)
        return (sets.gather(0, errors.argsort(dim=0, stable=True)),)

    def search(self, block: Tensor, weight: Tensor) -> Scales:
        """Best of three scales."""
        return (self.joint(block, weight, 1)[0][0],)

    def round(self, column: Tensor, scales: Scales) -> Tensor:
        """Round to the integers -127..127."""
        scale = scales[0].float()
        return torch.round(quotient(column, scale)).clamp(-127, 127) * scale


# How many stored scales under and over the plain rule's are tried: as far as about 0.6 and 1.25
# times its value (E5M2 has 4 steps an octave, E4M3 8, a power of two 1).
REACH = {"E5M2": (3, 1), "E4M3": (6, 2), "E8M0": (1, 1)}


def grid_of(name: str) -> Grid:
    """Make the grid of a registered format.

    Raises
    ------
    CalibrationError
        For a format that has no grid; FormatError for an unknown name.
    """
    fmt = formats.get(name)
    kind = fmt.scale_tensors[0].type.name
    if fmt.code_bits == 4 and kind in REACH:
        return E2M1Grid(fmt, *REACH[kind])
    if name == "int4":
        return IntGrid(fmt)
    if name == "int8":
        return ByteGrid(fmt)
    raise CalibrationError(f"format {name} cannot be calibrated; int4, int8 and E2M1 ones can")
