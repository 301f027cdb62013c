"""Weights whose codes and scales are trained: what is stored, seen as tensors with gradients.

A table holds all weights of one format as one list of groups, because a network has hundreds of
small weights, and rounding takes a dozen passes. A latent weight moves in units of its group's
first scale, so that one rate fits all weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from amx_tvm.calibration.fake import log2_of, quotient, round_magnitude, round_scale, straight
from amx_tvm.formats import Format, Quantized, e2m1
from amx_tvm.formats.int4 import LARGEST_CODE, Int4
from amx_tvm.formats.scales import Minifloat

Weights = Mapping[str, tuple[np.ndarray, Quantized]]
INSIDE = 1e-3  # how far from its cell's edge a latent weight starts, in units of the scale


def trainable(start: Quantized) -> bool:
    """Whether a rounded weight has elements and scales that training knows, in whole groups."""
    whole = start.codes.shape[-1] % start.format.group_size == 0
    return whole and table_kind(start.format) is not None


def table_kind(fmt: Format) -> type[Table] | None:
    """The table that trains a format, None where there is none."""
    if isinstance(fmt, Int4):
        return IntTable
    kinds = [tensor.type for tensor in fmt.scale_tensors]
    floats = fmt.rule is not None and all(isinstance(kind, Minifloat) for kind in kinds)
    return FloatTable if floats else None


def table_of(fmt: Format, weights: Weights) -> Table:
    """Make the table of a trainable format's weights; arguments as `Table`'s."""
    kind = table_kind(fmt)
    assert kind is not None
    return kind(fmt, weights)


class Table(nn.Module, ABC):
    """All trained weights of one format.

    Parameters
    ----------
    fmt : a format that `trainable` knows
    weights : by name, the float weight float32 [N, K] in the basis of the start and its rounded
        form; K is whole groups
    """

    latent: Tensor
    unit: Tensor
    fixed: Tensor

    def __init__(self, fmt: Format, weights: Weights) -> None:
        super().__init__()
        self.format = fmt
        self.names = [tensor.name for tensor in fmt.scale_tensors]
        self.shapes = {name: array.shape for name, (array, _) in weights.items()}
        self.rows = {name: start.tensor_scale for name, (_, start) in weights.items()}
        starts = [self._start(*pair) for pair in weights.values()]
        latent, unit, scales, fixed = zip(*starts, strict=True)
        self.register_buffer("latent", torch.cat(latent))
        self.register_buffer("unit", torch.cat(unit))
        self.register_buffer("fixed", torch.cat(fixed))
        self.moved = nn.Parameter(torch.zeros_like(self.latent))
        self.logs = nn.Parameter(log2_of(torch.cat(scales, dim=1)))

    @abstractmethod
    def _start(self, array: np.ndarray, start: Quantized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tensors of one weight, from its float form and its rounded one.

        Returns
        -------
        Latent weights [groups, size] that round to the start, the unit that they move in, trained
        scales [1 or 2, groups], and what else a group has [groups].
        """

    @abstractmethod
    def forward(self) -> dict[str, Tensor]:
        """The weights [N, K] as the network will have them."""

    @abstractmethod
    def _stored(self) -> list[np.ndarray]:
        """Scale tensors [groups] in stored form."""

    def _apart(self, table: Tensor) -> dict[str, Tensor]:
        sizes = [math.prod(shape) // self.format.group_size for shape in self.shapes.values()]
        parts = table.split(sizes)
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    @torch.no_grad()
    def quantized(self) -> Iterator[tuple[str, Quantized]]:
        """Names and stored forms of all weights."""
        weights = self._apart((self.latent + self.moved * self.unit).cpu())
        stored = self._stored()
        first = 0
        for name, (rows, columns) in self.shapes.items():
            groups = columns // self.format.group_size
            part = [x[first : first + rows * groups].reshape(rows, groups) for x in stored]
            first += rows * groups
            scales = {n: np.ascontiguousarray(x) for n, x in zip(self.names, part, strict=True)}
            row = self.rows[name]
            spread = None
            if row is not None:
                spread = np.broadcast_to(np.asarray(row, np.float32), (rows, 1))
            values = weights[name].numpy().reshape(rows, groups, -1)
            codes = self.format.encode(values, scales, spread).reshape(rows, columns)
            yield name, Quantized(np.ascontiguousarray(codes), scales, self.format, row)


class FloatTable(Table):
    """Formats of E2M1 elements whose scales are 8-bit floats, one or a pair a group.

    `fixed` is the float32 scale of a group's tensor, 1 where the format has none.
    """

    def _start(self, array: np.ndarray, start: Quantized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row = 1.0 if start.tensor_scale is None else float(start.tensor_scale)
        values = torch.from_numpy(self.format.dequantize(start)).view(-1, self.format.group_size)
        stored = [start.scales[name].reshape(-1) for name in self.names]
        scale = torch.from_numpy(np.stack([self.kind.decode(part) for part in stored])) * row
        exact = torch.from_numpy(array).view(-1, self.format.group_size)
        latent, unit = _inside_cells(exact, values, scale)
        return latent, unit, scale, torch.full((len(latent),), row)

    @property
    def kind(self) -> Minifloat:
        """Type of the scales."""
        kind = self.format.scale_tensors[0].type
        assert isinstance(kind, Minifloat)
        return kind

    def forward(self) -> dict[str, Tensor]:
        """The weights [N, K] as the network will have them."""
        exact = torch.exp2(self.logs)
        stored = round_scale(exact.detach() / self.fixed, self.kind) * self.fixed
        scales = straight(stored, exact)[..., None]
        weight = self.latent + self.moved * self.unit
        positive = weight > 0
        scale = torch.where(positive, scales[0], scales[-1])
        ratio = quotient(weight.abs(), scale).clamp(max=e2m1.LARGEST)
        value = straight(round_magnitude(ratio.detach()), ratio) * scale
        return self._apart(torch.where(positive, value, -value))

    def _stored(self) -> list[np.ndarray]:
        exact = round_scale(torch.exp2(self.logs) / self.fixed, self.kind).cpu().numpy()
        return [self.kind.encode(part) for part in exact]


class IntTable(Table):
    """int4: the float16 scale of a group is trained, its zero point, in `fixed`, stays."""

    def _start(self, array: np.ndarray, start: Quantized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size = self.format.group_size
        scale = torch.from_numpy(start.scales["scale"].reshape(-1).astype(np.float32))
        zero = torch.from_numpy(start.scales["zero"].reshape(-1).astype(np.float32))
        code = torch.from_numpy(start.codes.reshape(-1, size).astype(np.float32))
        low = torch.where(code > 0, code - 0.5 + INSIDE, -math.inf)
        high = torch.where(code < LARGEST_CODE, code + 0.5 - INSIDE, math.inf)
        exact = torch.from_numpy(array).view(-1, size)
        ratio = quotient(exact, scale[:, None]) + zero[:, None]
        latent = (ratio.maximum(low).minimum(high) - zero[:, None]) * scale[:, None]
        return latent, scale[:, None].expand_as(latent), scale[None], zero

    def forward(self) -> dict[str, Tensor]:
        """The weights [N, K] as the network will have them."""
        exact = torch.exp2(self.logs[0])
        scale = straight(exact.detach().half().float(), exact)[:, None]
        zero = self.fixed[:, None]
        ratio = quotient(self.latent + self.moved * self.unit, scale)
        ratio = ratio.maximum(-zero).minimum(LARGEST_CODE - zero)
        return self._apart(straight(torch.floor(ratio.detach() + 0.5), ratio) * scale)

    def _stored(self) -> list[np.ndarray]:
        scale = torch.exp2(self.logs[0]).half().cpu().numpy()
        return [scale, self.fixed.to(torch.uint8).cpu().numpy()]


def _inside_cells(weight: Tensor, start: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Latent weights: the float weight, moved into the cell that rounds to the start's code.

    All are [groups, group size]; scales [1 or 2, groups]. Returns them and the scale of each
    weight's sign.
    """
    sign = torch.where(start != 0, start.sign(), torch.where(weight > 0, 1.0, -1.0))
    unit = torch.where(sign > 0, scales[0][..., None], scales[-1][..., None])
    code = quotient(start.abs(), unit)
    edges = torch.tensor([-math.inf, *e2m1.MIDPOINTS, math.inf])
    index = torch.bucketize(code.contiguous(), edges[1:-1], right=True)
    low, high = edges[index] + INSIDE, edges[index + 1] - INSIDE
    ratio = quotient(weight * sign, unit).maximum(low).minimum(high)
    return sign * ratio * unit, unit
