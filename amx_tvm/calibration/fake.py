"""Rounding to the E2M1 formats in torch, on any device: what training runs on.

The twin of `Format.quantize_dequantize(activation=True)`, value by value: scales of each group by
the format's rule, from the plain rule or by four over six, then E2M1, ties away from zero both
times. Nothing is packed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from amx_tvm.formats import Format, e2m1
from amx_tvm.formats.four_over_six import STRETCH, FourOverSix
from amx_tvm.formats.scale_rules import TENSOR_RANGE, Power, ScaleRule
from amx_tvm.formats.scales import HALF, Minifloat

TIE = float(HALF)  # trunc(x + TIE) rounds x >= 0 to nearest, ties away from zero
# A Python number: NumPy's would bind what torch.compile makes to gradient or to inference mode.
RANGE = float(TENSOR_RANGE)


def round_magnitude(ratio: Tensor) -> Tensor:
    """Nearest E2M1 magnitude of ratios >= 0, saturating at 6."""
    step = torch.where(ratio < 2, 0.5, torch.where(ratio < 4, 1.0, 2.0))
    return (torch.floor(ratio / step + TIE) * step).clamp(max=e2m1.LARGEST)


def power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent for int32 exponents from -126 to 127, exactly."""
    return ((exponent + 127) << 23).view(torch.float32)


def exponent_of(x: Tensor) -> Tensor:
    """floor(log2 x) of normal float32 x > 0, as int32; -127 for 0 and subnormal numbers."""
    return (x.view(torch.int32) >> 23) - 127


def round_scale(scale: Tensor, kind: Minifloat) -> Tensor:
    """Nearest number of an 8-bit float scale type, for values >= 0, saturating at its largest."""
    exponent = exponent_of(scale).clamp(min=1 - kind.bias, max=64)
    step = power_of_two(exponent - kind.mantissa_bits)
    return (torch.floor(scale / step + TIE) * step).clamp(max=largest_of(kind))


def largest_of(kind: Minifloat) -> float:
    """Largest number of a scale type."""
    exponent, steps = divmod(kind.largest, 1 << kind.mantissa_bits)
    return (1 + steps / (1 << kind.mantissa_bits)) * 2.0 ** (exponent - kind.bias)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(_context: object, rounded: Tensor, _exact: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(_context: object, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def straight(rounded: Tensor, exact: Tensor) -> Tensor:
    """`rounded` itself, whose gradient goes to `exact` unchanged."""
    return _Straight.apply(rounded, exact)


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """True division, and 0 where the denominator is 0, in the gradient too."""
    held = denominator > 0
    return torch.where(held, numerator / torch.where(held, denominator, 1.0), 0.0)


def tensor_scale(x: Tensor, rule: ScaleRule) -> Tensor | None:
    """The rule's float32 scale of every row [..., 1]; None for formats without one."""
    if not rule.tensor_scaled:
        return None
    return x.abs().amax(-1, keepdim=True) / RANGE


def group_scale(largest: Tensor, rule: ScaleRule, row: Tensor | None) -> Tensor:
    """The number that is stored as a group's scale; 0 for an empty half."""
    if rule.power is not Power.NONE:
        exponent = exponent_of(largest) - 2
        if rule.power is Power.NEAREST:
            exponent = exponent + ((largest.view(torch.int32) & 0x7FFFFF) >= 0x600000).int()
        return torch.where(largest > 0, power_of_two(exponent.clamp(min=-126)), 0.0)
    sixth = largest / e2m1.LARGEST
    if row is None:
        return round_scale(sixth, rule.type)
    return round_scale(quotient(sixth, row), rule.type)


def fake_round(x: Tensor, fmt: Format) -> Tensor:
    """Round float32 [..., K] to a format of E2M1 elements; the gradient passes straight through."""
    with torch.no_grad():
        stored = _stored(x.detach(), fmt)
    return straight(stored, x)


def _stored(x: Tensor, fmt: Format) -> Tensor:
    if x.device.type == "cpu":  # several times faster than the twin there
        array = fmt.quantize_dequantize(x.contiguous().numpy(), activation=True)
        return torch.from_numpy(array)
    rows = x.flatten(0, -2)
    torch._dynamo.maybe_mark_dynamic(rows, 0)  # one kernel for all numbers of tokens
    return fused(rounded)(rows, fmt).view(x.shape)


@functools.cache
def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of dozens of small kernels as one, where torch has Triton to make it."""
    return torch.compile(function) if find_spec("triton") is not None else function


def rounded(x: Tensor, fmt: Format, row: Tensor | None = None) -> Tensor:
    """Round float32 [..., K] to a format that has a rule for its scales, on x's device.

    `row` takes the place of the float32 scales [..., 1] that the format gives rows.
    """
    rule = fmt.rule
    assert rule is not None
    columns, size = x.shape[-1], fmt.group_size
    row = tensor_scale(x, rule) if row is None else row
    groups = functional.pad(x, (0, -columns % size)).unflatten(-1, (-1, size))
    row = None if row is None else row[..., None]
    magnitude, positive = groups.abs(), groups > 0
    if len(fmt.scale_tensors) == 2:
        halves = [torch.where(positive, magnitude, 0.0), torch.where(positive, 0.0, magnitude)]
    else:
        halves = [magnitude]
    total = torch.zeros_like(groups)
    for half in halves:
        largest = half.amax(-1, keepdim=True)
        value = _under(half, group_scale(largest, rule, row), row)
        if isinstance(fmt, FourOverSix):
            tried = _under(half, group_scale(largest * float(STRETCH), rule, row), row)
            better = _error(tried, half) < _error(value, half)
            value = torch.where(better, tried, value)
        total += value
    signed = torch.where(positive, total, -total)
    return signed.flatten(-2)[..., :columns]


def _under(half: Tensor, scale: Tensor, row: Tensor | None) -> Tensor:
    """Round magnitudes under stored scales; decoded in the format's order of products."""
    divisor = scale if row is None else scale * row
    value = round_magnitude(quotient(half, divisor)) * scale
    return value if row is None else value * row


def _error(value: Tensor, exact: Tensor) -> Tensor:
    return (value - exact).square().sum(-1, keepdim=True)


def log2_of(values: Tensor) -> Tensor:
    """log2 of scales, 0 becoming a number far under every stored one."""
    return torch.where(values > 0, values.clamp(min=2.0**-120).log2(), -120.0)
