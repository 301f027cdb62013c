"""Exact changes of a layer's float weights that make them and their inputs easier to quantize.

Each function changes a layer's weights (name within the layer -> float32 tensor) so that the layer
computes what it computed before, up to float32 rounding. Nothing is added to the model: the factors
are folded into weights and norm weights that exist.

    rotate_values   v_proj rows, o_proj columns    R v ... R^T
    smooth          norm / s, W * s                 inputs of q, k, v and of gate, up
                    up_proj rows / s, down_proj * s inputs of down_proj
"""

from __future__ import annotations

import torch
from torch import Tensor

from amx_tvm.calibration.block import STAGES, mlp_norm
from amx_tvm.errors import CalibrationError
from amx_tvm.models import DecoderConfig


def producer_of(stage: str, config: DecoderConfig) -> str:
    """The parameter whose rows are a stage's input channels: dividing them divides the input."""
    if stage == "mlp_hidden":
        return "mlp.up_proj.weight"
    norm = "input_layernorm" if stage == "attention_input" else mlp_norm(config)
    return f"{norm}.weight"


def hadamard(size: int) -> Tensor:
    """Orthonormal Sylvester Hadamard matrix float32 [size, size]; size is a power of two."""
    if size < 1 or size & (size - 1):
        raise CalibrationError(
            f"a Hadamard rotation needs a power of two, and heads of this model have {size} "
            "values; leave RotateValues out of the recipe"
        )
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def rotate_values(weights: dict[str, Tensor], head_dim: int) -> None:
    """Rotate every head's values by a Hadamard matrix, and o_proj's columns with them.

    A head's output is a mix of its value vectors, so rotated values give a rotated mix, and
    o_proj's columns undo it: the matrix is symmetric and orthonormal.
    """
    rotation = hadamard(head_dim).to(weights["self_attn.o_proj.weight"].device)
    for name in ("self_attn.v_proj.weight", "self_attn.v_proj.bias"):
        if name in weights:
            heads = weights[name].view(-1, head_dim, *weights[name].shape[1:])
            weights[name] = torch.einsum("ab,hb...->ha...", rotation, heads).reshape(
                weights[name].shape
            )
    out = weights["self_attn.o_proj.weight"]
    heads = out.view(len(out), -1, head_dim)
    weights["self_attn.o_proj.weight"] = (heads @ rotation).reshape(out.shape)


def smoothing_factors(inputs: Tensor, power: float) -> Tensor:
    """Divisors [K] of a linear's inputs float32 [..., K]: (rms of the channel) ** power.

    Their geometric mean is 1. Channels much quieter than the mean are treated as if they had
    a thousandth of it: a silent channel would otherwise get an unbounded weight.
    """
    flat = inputs.reshape(-1, inputs.shape[-1])
    rms = flat.square().mean(0).sqrt()
    rms = rms.clamp(min=float(rms.mean()) * 1e-3 + torch.finfo(torch.float32).tiny)
    factors = rms**power
    return factors / factors.log().mean().exp()


def smooth(weights: dict[str, Tensor], stage: str, factors: Tensor, config: DecoderConfig) -> None:
    """Divide a stage's inputs by factors [K] and multiply its linears' columns by them."""
    name = producer_of(stage, config)
    shape = (-1,) + (1,) * (weights[name].dim() - 1)
    weights[name] = weights[name] / factors.view(shape)
    bias = name.replace(".weight", ".bias")
    if bias in weights:
        weights[bias] = weights[bias] / factors
    for part in STAGES[stage]:
        weights[f"{part}.weight"] = weights[f"{part}.weight"] * factors
