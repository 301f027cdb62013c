"""GPTQ on the grids of the 4-bit formats, with each group's scales chosen inside the loop.

For a linear y = x W^T and H = sum of x x^T over the calibration tokens, the columns of W are
rounded one after the other and the error of each is spread over the columns that are still free
(Frantar et al., arXiv 2210.17323). Three things are particular here:

* A group's scales are chosen when its turn comes, from the weights as they are then, errors of
  earlier groups included, and by the loss that GPTQ itself minimizes: the squared error of column
  j counts 1 / U[j, j]^2, where U is the upper Cholesky factor of H^-1.
* Groups are contiguous in the stored order and cannot be torn apart, so the order of most energy
  first holds between groups and inside each group, never across groups.
* H comes from the inputs of the quantized network, whose layers before this one are quantized
  already, while the target is the output of the float network on its own inputs f. With
  C = sum of (f - x) x^T the best unrounded weight is W + W C (H + damping)^-1; GPTQ starts from a
  share `correction` of the way there (asymmetric calibration, as in GPTAQ, arXiv 2504.02692).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from amx_tvm.calibration.grids import Grid, Scales
from amx_tvm.formats import Quantized

AT_ONCE = 1 << 20  # weights that `plain` rounds together: their candidates take nine times as much


@dataclass
class Statistics:
    """Second moments of one linear input, in float32 [K, K], gathered batch by batch.

    hessian : sum of x x^T over tokens
    mixed : sum of (f - x) x^T, f being the float network's input for the same token; or None
    tokens : tokens seen
    """

    hessian: Tensor
    mixed: Tensor | None
    tokens: int = 0

    @classmethod
    def empty(cls, columns: int, mixed: bool, device: str | torch.device = "cpu") -> Statistics:
        """Start with nothing seen; `mixed` says whether that moment is gathered as well."""
        zeros = torch.zeros(columns, columns, device=device)
        return cls(zeros, zeros.clone() if mixed else None)

    def add(self, seen: Tensor, reference: Tensor) -> None:
        """Add tokens: the quantized network's inputs and the float network's, both [..., K]."""
        seen = seen.reshape(-1, seen.shape[-1])
        self.hessian.addmm_(seen.T, seen)
        if self.mixed is not None:
            reference = reference.reshape(-1, reference.shape[-1])
            self.mixed.addmm_((reference - seen).T, seen)
        self.tokens += len(seen)


@dataclass(frozen=True)
class Rounded:
    """A rounded weight: values float32 [N, K], its stored form, and its relative output error.

    error is ||(W - Q) x||^2 / ||W x||^2 over the calibration tokens, W being the target.
    """

    values: Tensor
    quantized: Quantized
    error: float = field(default=0.0)


def corrected(weight: Tensor, statistics: Statistics, damping: float, share: float) -> Tensor:
    """Move a weight [N, K] towards the one that maps quantized inputs to float outputs best."""
    if share == 0 or statistics.mixed is None:
        return weight
    moment = _damped(statistics.hessian, damping).double()
    change = torch.linalg.solve(moment, (weight.double() @ statistics.mixed.double()).T).T
    return weight + share * change.float()


def output_error(target: Tensor, values: Tensor, hessian: Tensor) -> float:
    """||(target - values) x||^2 / ||target x||^2 for inputs with the second moment `hessian`."""
    difference = target - values
    total = ((target @ hessian) * target).sum().item()
    return ((difference @ hessian) * difference).sum().item() / total if total > 0 else 0.0


def plain(weight: Tensor, grid: Grid, hessian: Tensor, search: bool) -> Rounded:
    """Round without error feedback.

    With `search` the scales minimize the error weighted by the inputs' energy (the diagonal of
    the hessian); without it they follow the format's own rule.
    """
    grid.prepare(weight)
    size, columns = grid.group_size, weight.shape[1]
    short = -columns % size
    energy = functional.pad(torch.diagonal(hessian), (0, short)).view(-1, size)
    values, scales = [], []
    for rows in functional.pad(weight, (0, short)).split(max(1, AT_ONCE // (columns + short))):
        blocks = rows.reshape(-1, size)  # all groups of these rows; few large kernels
        if search:
            chosen = grid.search(blocks, energy.repeat(len(rows), 1))
        else:
            chosen = grid.plain(blocks)
        rounded = grid.round(blocks, tuple(part[:, None] for part in chosen))
        values.append(rounded.view(len(rows), -1)[:, :columns])
        scales.append(tuple(part.view(len(rows), -1) for part in chosen))
    found = torch.cat(values)
    stored = grid.quantized(found, tuple(torch.cat(part) for part in zip(*scales, strict=True)))
    return Rounded(found, stored, output_error(weight, found, hessian))


def gptq(
    weight: Tensor,
    grid: Grid,
    hessian: Tensor,
    *,
    damping: float = 0.01,
    ordered: bool = True,
    search: str = "diagonal",
    keep: int = 3,
) -> Rounded:
    """Round a weight with error feedback.

    Parameters
    ----------
    weight : float32 [N, K], the target (see `corrected`)
    grid : the format's grid
    hessian : float32 [K, K]
    damping : share of the mean diagonal that is added to the diagonal
    ordered : groups, and columns inside a group, of most energy first
    search : "none" (the format's own scale rule), "diagonal" (each scale by the weighted error of
        plain rounding) or "joint" (the group is rounded with error feedback under every
        combination of the `keep` best scales of each sign, and the best result is kept)

    Returns
    -------
    Rounded, with columns and groups in the stored order.
    """
    grid.prepare(weight)
    size, columns = grid.group_size, weight.shape[1]
    order = _order(torch.diagonal(hessian), size) if ordered else torch.arange(columns)
    # Ragged last groups stay behind the others: the order moves whole groups, the last one last.
    factor = _inverse_factor(hessian[order][:, order], damping)
    free, values = weight[:, order].clone(), torch.empty_like(weight)
    scales: dict[int, Scales] = {}
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        block, local = free[:, start:stop], factor[start:stop, start:stop]
        importance = torch.diagonal(local) ** -2
        if search == "none":
            chosen = grid.plain(block)
        elif search == "diagonal":
            chosen = grid.search(block, importance)
        else:
            trial = grid.joint(block, importance, keep)
            _, _, loss = _feedback(block.expand(len(trial[0]), *block.shape), grid, trial, local)
            best = loss.argmin(dim=0, keepdim=True)
            chosen = tuple(part.gather(0, best)[0] for part in trial)
        rounded, errors, _ = _feedback(block, grid, chosen, local)
        values[:, order[start:stop]] = rounded
        scales[int(order[start:stop].min()) // size] = chosen
        free[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    groups = [scales[group] for group in sorted(scales)]
    stacked = tuple(torch.stack(part, dim=1) for part in zip(*groups, strict=True))
    stored = grid.quantized(values, stacked)
    return Rounded(values, stored, output_error(weight, values, hessian))


def _feedback(
    block: Tensor, grid: Grid, scales: Scales, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Round one group [..., N, g] column by column; values, scaled errors and loss [..., N]."""
    work, rounded, errors = block.clone(), torch.empty_like(block), torch.empty_like(block)
    for j in range(block.shape[-1]):
        rounded[..., j] = grid.round(work[..., j], scales)
        errors[..., j] = (work[..., j] - rounded[..., j]) / factor[j, j]
        work[..., j + 1 :] -= errors[..., j : j + 1] * factor[j, j + 1 :]
    return rounded, errors, errors.square().sum(-1)


def _order(energy: Tensor, size: int) -> Tensor:
    """Columns by energy: whole groups first, then inside each group; a ragged group stays last."""
    energy = energy.cpu()
    full = len(energy) // size
    groups = energy[: full * size].view(full, size)
    inner = groups.argsort(dim=1, descending=True, stable=True)
    outer = groups.sum(1).argsort(descending=True, stable=True)
    order = (inner + torch.arange(full)[:, None] * size)[outer].reshape(-1)
    return torch.cat([order, torch.arange(full * size, len(energy))])


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """Add `damping` times the mean diagonal; an input that is always 0 gets a diagonal of 1."""
    diagonal = torch.diagonal(hessian)
    extra = damping * diagonal.mean() + (diagonal <= 0).float()
    return hessian + torch.diag(extra.expand(len(hessian)))


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse, H^-1 = U^T U, computed in float64."""
    lower = torch.linalg.cholesky(_damped(hessian, damping).double())
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
