"""Weights whose codes and scales are trained: what is stored, seen as tensors with gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from amx_tvm.calibration.fake import log2_of, quotient, round_magnitude, round_scale, straight
from amx_tvm.formats import Format, Quantized, e2m1
from amx_tvm.formats.scales import Minifloat

INSIDE = 1e-3  # how far from its cell's edge a latent weight starts, in units of the scale


def trainable(start: Quantized) -> bool:
    """Whether a rounded weight has elements and scales that training knows, in whole groups."""
    kinds = [tensor.type for tensor in start.format.scale_tensors]
    whole = start.codes.shape[-1] % start.format.group_size == 0
    return start.format.rule is not None and whole and all(isinstance(k, Minifloat) for k in kinds)


class Table(nn.Module):
    """All trained weights of one format, as one table of groups.

    One table, because a network has hundreds of small weights, and rounding takes a dozen passes.

    Parameters
    ----------
    fmt : a format of E2M1 elements with scales of 8-bit floats
    weights : by name, the float weight float32 [N, K] in the basis of the start and its rounded
        form; K is whole groups
    """

    latent: Tensor
    unit: Tensor
    row: Tensor

    def __init__(self, fmt: Format, weights: Mapping[str, tuple[np.ndarray, Quantized]]) -> None:
        super().__init__()
        kind = fmt.scale_tensors[0].type
        assert isinstance(kind, Minifloat)
        self.format, self.kind = fmt, kind
        self.names = [tensor.name for tensor in fmt.scale_tensors]
        self.shapes = {name: array.shape for name, (array, _) in weights.items()}
        self.rows = {name: start.tensor_scale for name, (_, start) in weights.items()}
        latents, units, scales, rows = [], [], [], []
        for array, start in weights.values():
            row = 1.0 if start.tensor_scale is None else float(start.tensor_scale)
            values = torch.from_numpy(fmt.dequantize(start)).view(-1, fmt.group_size)
            stored = [start.scales[name].reshape(-1) for name in self.names]
            scale = torch.from_numpy(np.stack([self.kind.decode(part) for part in stored])) * row
            exact = torch.from_numpy(array).view(-1, fmt.group_size)
            latent, unit = _inside_cells(exact, values, scale)
            latents.append(latent)
            units.append(unit)
            scales.append(scale)
            rows.append(torch.full((len(latent),), row))
        # Trained in units of the group's scale, so that one rate fits all weights.
        self.register_buffer("latent", torch.cat(latents))
        self.register_buffer("unit", torch.cat(units))
        self.register_buffer("row", torch.cat(rows))
        self.moved = nn.Parameter(torch.zeros_like(self.latent))
        self.logs = nn.Parameter(log2_of(torch.cat(scales, dim=1)))

    def scales(self) -> Tensor:
        """Values of the stored scales [1 or 2, groups], the gradient passing the rounding."""
        exact = torch.exp2(self.logs)
        stored = round_scale(exact.detach() / self.row, self.kind) * self.row
        return straight(stored, exact)

    def forward(self) -> dict[str, Tensor]:
        """The weights [N, K] as the network will have them."""
        weight, scales = self.latent + self.moved * self.unit, self.scales()[..., None]
        positive = weight > 0
        scale = torch.where(positive, scales[0], scales[-1])
        ratio = quotient(weight.abs(), scale).clamp(max=e2m1.LARGEST)
        value = straight(round_magnitude(ratio.detach()), ratio) * scale
        return self._apart(torch.where(positive, value, -value))

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
        exact = torch.exp2(self.logs) / self.row
        stored = round_scale(exact, self.kind).cpu().numpy()
        first = 0
        for name, (rows, columns) in self.shapes.items():
            groups = columns // self.format.group_size
            part = stored[:, first : first + rows * groups].reshape(-1, rows, groups)
            first += rows * groups
            scales = {n: self.kind.encode(x) for n, x in zip(self.names, part, strict=True)}
            row = self.rows[name]
            spread = None
            if row is not None:
                spread = np.broadcast_to(np.asarray(row, np.float32), (rows, 1))
            values = weights[name].numpy().reshape(rows, groups, -1)
            codes = self.format.encode(values, scales, spread).reshape(rows, columns)
            yield name, Quantized(np.ascontiguousarray(codes), scales, self.format, row)


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
