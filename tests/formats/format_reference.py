"""The formats written a second time, value by value and literally, for tests only.

Nothing here uses amx_tvm: grids are enumerated from bit fields, rounding compares with exact
midpoints, loops run over single values. `mx_round` is the integer routine of the AMXFP4 reference
code (microxcaling's `quantize_elemwise`, rounding mode `rd_away`), a third and independent form.
"""

from __future__ import annotations

import numpy as np

F = np.float32
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def minifloat_grid(exponent_bits: int, mantissa_bits: int, last: int) -> list[float]:
    """Values of bytes 0..last, from the definition of a float with subnormals."""
    bias = 2 ** (exponent_bits - 1) - 1
    grid = []
    for byte in range(last + 1):
        exponent, mantissa = byte >> mantissa_bits, byte & (2**mantissa_bits - 1)
        if exponent == 0:
            grid.append(mantissa * 2.0 ** (1 - bias - mantissa_bits))
        else:
            grid.append((1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))
    return grid


E5M2 = minifloat_grid(5, 2, 0x7B)
E4M3 = minifloat_grid(4, 3, 0x7E)
E4M3_480 = minifloat_grid(4, 3, 0x7F)


def nearest_away(value: float, grid: list[float]) -> int:
    """Index of the nearest entry of an ascending grid, a tie going up, saturating at the end."""
    index = 0
    while index + 1 < len(grid) and float(value) >= (grid[index] + grid[index + 1]) / 2:
        index += 1
    return index


def floor_log2(value: F) -> int:
    return int(np.frexp(np.float64(value))[1]) - 1


def pot(maximum: F, rounded: bool = False) -> int:
    """E8M0 byte of a group maximum; 0 for an empty half."""
    if maximum == 0:
        return 0
    exponent = floor_log2(maximum)
    if rounded and float(maximum) / 2.0**exponent >= 1.75:
        exponent += 1
    return min(max(exponent - 2, -127), 125) + 127


def scale_of(rule: str, maximum: F, tensor: F | None) -> tuple[int, F]:
    """(stored byte, float32 scale) of a group maximum under a rule."""
    if rule in ("pot", "pot_r"):
        byte = pot(maximum, rule == "pot_r")
        return byte, F(2.0 ** (byte - 127))
    grid = {"e5m2": E5M2, "e4m3": E4M3, "e4m3_480": E4M3_480, "e4m3_tensor": E4M3}[rule]
    scale = F(maximum) / F(6)
    if tensor is not None:
        scale = scale / tensor if tensor > 0 else F(0)
    byte = nearest_away(scale, grid)
    return byte, F(grid[byte])


# format -> (rule, one scale for each sign, group size)
FP4 = {
    "amxfp4": ("e5m2", True, 32),
    "amxfp4-e4m3": ("e4m3", True, 32),
    "amxfp4-e4m3-tensor": ("e4m3_tensor", True, 32),
    "amxfp4-pot": ("pot", True, 32),
    "amxfp4-pot-r": ("pot_r", True, 32),
    "amxfp4-e4m3-480": ("e4m3_480", True, 32),
    "mxfp4": ("pot", False, 32),
    "mxfp4-e5m2": ("e5m2", False, 32),
    "nvfp4": ("e4m3_tensor", False, 16),
}


@np.errstate(over="ignore")
def quantize_fp4(name: str, matrix: np.ndarray):
    """(codes, scales by name, tensor scale, values) of a float32 matrix, one value at a time."""
    rule, pair, size = FP4[name]
    n, k = matrix.shape
    groups = -(-k // size)
    tensor = None
    if rule == "e4m3_tensor":
        tensor = F(np.abs(matrix).max()) / F(6 * 448)
    scale_names = ("positive", "negative") if pair else ("scale",)
    scales = {key: np.zeros((n, groups), np.uint8) for key in scale_names}
    codes = np.zeros((n, k), np.uint8)
    values = np.zeros((n, k), F)
    for row in range(n):
        for group in range(groups):
            columns = range(group * size, min(group * size + size, k))
            high = max([F(0)] + [matrix[row, c] for c in columns])
            low = min([F(0)] + [matrix[row, c] for c in columns])
            maxima = (high, -low) if pair else (max(high, -low),)
            found = []
            for key, maximum in zip(scale_names, maxima, strict=True):
                byte, scale = scale_of(rule, maximum, tensor)
                scales[key][row, group] = byte
                found.append(scale)
            for c in columns:
                value = matrix[row, c]
                scale = found[0] if value > 0 or not pair else found[1]
                divisor = scale if tensor is None else scale * tensor
                if value == 0 or divisor == 0:
                    continue
                index = nearest_away(np.abs(value / divisor), E2M1)
                codes[row, c] = index + (8 if value < 0 and index else 0)
                decoded = F(E2M1[index]) * scale
                decoded = decoded if tensor is None else decoded * tensor
                values[row, c] = -decoded if value < 0 and index else decoded
    return codes, scales, tensor, values


def round_away(value: float) -> int:
    """Nearest integer, ties away from zero (float64, exact for float32 input)."""
    value = float(value)
    return int(np.sign(value) * np.floor(abs(value) + 0.5))


def quantize_int4(matrix: np.ndarray):
    """(codes, scale float16, zero) of int4, one group at a time."""
    n, k = matrix.shape
    groups = -(-k // 32)
    codes = np.zeros((n, k), np.uint8)
    scale, zero = np.zeros((n, groups), np.float16), np.zeros((n, groups), np.uint8)
    for row in range(n):
        for group in range(groups):
            part = matrix[row, group * 32 : group * 32 + 32]
            high, low = max(F(0), part.max()), min(F(0), part.min())
            half = np.float16(min((high - low) / F(15), F(65504)))
            scale[row, group] = half
            step = F(half)
            zero[row, group] = min(round_away(-low / step), 15) if step else 0
            for i, value in enumerate(part):
                code = (round_away(value / step) if step else 0) + int(zero[row, group])
                codes[row, group * 32 + i] = min(max(code, 0), 15)
    return codes, scale, zero


def quantize_int8(matrix: np.ndarray):
    """(codes, scale float16) of int8, one group at a time."""
    n, k = matrix.shape
    groups = -(-k // 32)
    codes = np.zeros((n, k), np.uint8)
    scale = np.zeros((n, groups), np.float16)
    for row in range(n):
        for group in range(groups):
            part = matrix[row, group * 32 : group * 32 + 32]
            half = np.float16(min(np.abs(part).max() / F(127), F(65504)))
            scale[row, group] = half
            for i, value in enumerate(part):
                q = round_away(value / F(half)) if half else 0
                codes[row, group * 32 + i] = min(max(q, -127), 127) + 128
    return codes, scale


def mx_round(value: F, bits: int, exponent_bits: int, largest: float) -> float:
    """`quantize_elemwise(value, bits, exponent_bits, largest, rd_away, true, true)`, saturating.

    `bits` counts sign and implied bit: 3 for E2M1, 4 for E5M2, 5 for E4M3.
    """
    pattern = int(np.asarray(value, F).view(np.uint32))
    sign, biased, mantissa = pattern >> 31, (pattern >> 23) & 255, pattern & 0x7FFFFF
    kept = bits - 1
    significant = 23 if biased == 0 else 24
    mantissa += 0 if biased == 0 else 1 << 23
    target = biased - 127 + (1 << (exponent_bits - 1)) - 1
    extra = min(1 - target if target <= 0 else 0, 24)
    mantissa >>= extra
    mantissa >>= significant - kept - 1
    mantissa = (mantissa + 1) >> 1
    if mantissa == 0:
        return 0.0
    exponent = biased - 127 if biased else -126
    result = mantissa * 2.0 ** (significant - kept + extra + exponent - 23)
    return float(np.copysign(min(result, largest), -1.0 if sign else 1.0))


def awkward_matrices(seed: int = 0) -> dict[str, np.ndarray]:
    """Named float32 matrices that have broken quantizers: every kind the formats promise."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((6, 96))
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.5, 3.0]
    tied = rng.choice(ties + [-t for t in ties] + [0.0], (6, 96))
    tied[:, ::32], tied[:, 1::32] = 6.0, -6.0  # the scale is then exactly the row's power of two
    scale_ties = normal / np.abs(normal).reshape(6, 3, 32).max(2).repeat(32, axis=1)
    middle = np.array([1.125, 1.375, 1.0625, 1.875, 1.75, 1.5])[:, None]  # halfway between scales
    cases = {
        "normal": normal * 0.02,
        "wide range": normal * np.exp2(rng.uniform(-149, 127, normal.shape)),
        "wide rows": normal * np.exp2(rng.integers(-140, 120, (6, 1))),
        "positive": np.abs(normal),
        "negative": -np.abs(normal),
        "sparse": normal * (rng.random(normal.shape) < 0.04),
        "all zero": normal * 0,
        "minus zero": np.where(rng.random(normal.shape) < 0.5, -0.0, normal),
        "exact ties": tied * np.exp2(rng.integers(-17, 12, (6, 1))),
        "scale ties": scale_ties * 6 * middle * np.exp2(rng.integers(-16, 8, (6, 1))),
        "heavy tails": rng.standard_t(1.1, normal.shape),
        "huge": normal * 1e38,
        "tiny": normal * 1e-43,
        "ragged by one": normal[:, :65] * 0.1,
        "ragged by most": normal[:, :95] * 0.1,
        "one group": normal[:1, :32],
        "barely a group": normal[:, :33],
    }
    with np.errstate(over="ignore", under="ignore"):
        return {
            key: np.clip(value, -3.4e38, 3.4e38).astype(np.float32) for key, value in cases.items()
        }
