"""Attention in torch: exact, or with all four operands rounded to four bits as engines round them.

The rounding is that of ``relax_passes.kernels.cpu.attention.quantized``, whose docstring says which
groups there are and why; this is its independent twin, over whole windows instead of cache pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amx_tvm import formats
from amx_tvm.formats import Format, e2m1

GROUP = 32  # positions of a group of the context
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention: q [batch, heads, tokens, d], k and v [batch, kv_heads, tokens, d]."""
    return functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, scale=scale
    )


def attention_of(name: str) -> Attend:
    """Attention under a format; "" is `exact`."""
    if not name:
        return exact
    fmt = formats.get(name)
    return lambda q, k, v, scale: quantized(q, k, v, scale, fmt)


def quantized(q: Tensor, k: Tensor, v: Tensor, scale: float, fmt: Format) -> Tensor:
    """Causal attention whose queries, keys, weights and values are rounded to a format."""
    repeat, tokens = q.shape[1] // k.shape[1], q.shape[2]
    q, k = (
        torch.from_numpy(fmt.quantize_dequantize(x.contiguous().numpy(), activation=True))
        for x in (q, k)
    )
    groups = -(-tokens // GROUP)
    short = groups * GROUP - tokens
    k, v = (functional.pad(x, (0, 0, 0, short)).repeat_interleave(repeat, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (scale * math.log2(math.e))
    position = torch.arange(groups * GROUP)
    seen = position <= position[:tokens, None]
    scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True).ceil())
    total = weights.sum(-1, keepdim=True)
    weights = rounded(weights, fmt)
    earlier = position // GROUP < (position // GROUP)[:tokens, None]
    values = v.transpose(-1, -2)
    out = (weights * earlier) @ rounded(values, fmt).transpose(-1, -2)
    for place in range(min(GROUP, tokens)):  # queries at this place of their group
        own = rounded(values * (position % GROUP <= place), fmt)
        own = own.unflatten(-1, (groups, GROUP))
        rows = torch.arange(place, tokens, GROUP)
        part = weights[:, :, rows].unflatten(-1, (groups, GROUP))
        part = part[:, :, torch.arange(len(rows)), torch.arange(len(rows))]
        out[:, :, rows] += torch.einsum("bhgt,bhdgt->bhgd", part, own[:, :, :, : len(rows)])
    return out / total


def rounded(x: Tensor, fmt: Format) -> Tensor:
    """Round groups along the last axis, scales having as many exponents as they need."""
    grouped = x.unflatten(-1, (-1, fmt.group_size))
    high, depth = (part.amax(-1, keepdim=True).clamp(min=0) for part in (grouped, -grouped))
    if len(fmt.terms) == 1:
        high = depth = torch.maximum(high, depth)
    scale = torch.where(grouped > 0, _scale(high, fmt), _scale(depth, fmt))
    ratio = (grouped.abs() / scale).nan_to_num(0.0)
    index = torch.bucketize(ratio.contiguous(), torch.tensor(e2m1.MIDPOINTS), right=True)
    magnitude = torch.tensor(e2m1.MAGNITUDES)[index] * scale
    return torch.where(grouped < 0, -magnitude, magnitude).flatten(-2)


def _scale(largest: Tensor, fmt: Format) -> Tensor:
    """Scale of groups with these largest magnitudes, in the mantissa of the format's type."""
    kind: Any = fmt.scale_tensors[0].type
    if kind.name == "E8M0":
        mantissa, exponent = torch.frexp(largest)  # in [0.5, 1)
        up = fmt.name.endswith("pot-r") & (mantissa >= 0.875)
        power = torch.ldexp(torch.ones_like(largest), exponent - 3 + up.int())
        return torch.where(largest > 0, power, 0.0)
    mantissa, exponent = torch.frexp(largest / e2m1.LARGEST)
    steps = 2.0 ** (kind.mantissa_bits + 1)
    return torch.ldexp(torch.floor(mantissa * steps + 0.5) / steps, exponent)
