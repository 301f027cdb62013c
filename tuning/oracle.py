"""What a linear has to compute, in NumPy: random operands, packed for a kernel, and its result.

Weights repeat a block of 7 tiles (an odd number, so that a kernel that mixes up tiles is caught)
over all of N: quantizing a vocabulary of 128k rows would cost more than measuring it. Activations
are quantized here, apart from the kernels that do it in a model. Results are float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from amx_tvm.formats import Format, packing
from relax_passes.activation import Scheme
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

BLOCK_TILES = 7
# Of the largest result.
EXACT = 1e-5  # float32 sums in another order
HALF = 2.0**-11  # y is rounded to float16, as a cache keeps it
MERGED = 4e-3  # kernels for several rows merge two scales, see kernels/cpu/linear/merge.py
FRAGMENT_LIMIT = 1.5e-3  # norm of the deviation: y is float16, and scales are applied in it


def limit(spec: LinearSpec, m: int) -> float:
    """Return how far a correct CPU kernel may be from the oracle, of its largest value."""
    from relax_passes.kernels.cpu.linear.knobs import CpuKnobs  # needs TVM; CUDA's operands do not

    integer = spec.format != "none" and spec.activation.integer
    merged = integer and m >= CpuKnobs().merge_rows and len(spec.fmt.terms) > 1
    rounding = HALF if spec.out_dtype == "float16" else 0.0
    return (MERGED if merged else EXACT) + rounding


class Operands:
    """Arguments of a kernel for several M, and the right answers.

    Attributes
    ----------
    weights : list of numpy.ndarray
        Packed weight arguments, the same for every M.
    """

    def __init__(self, spec: LinearSpec, seed: int = 0):
        self.spec, self._rng = spec, np.random.default_rng(seed)
        rows = min(spec.tiles, BLOCK_TILES) * TILE_ROWS
        block = self._rng.standard_normal((rows, spec.k)).astype(np.float32)
        whole, rest = divmod(spec.tiles * TILE_ROWS, rows)
        if spec.format == "none":
            padded = np.ascontiguousarray(block.reshape(-1, TILE_ROWS, spec.k).transpose(0, 2, 1))
            packed, dense = {"w_dense": padded}, block
        else:
            quantized = spec.fmt.quantize(block)
            dense = spec.fmt.dequantize(quantized)
            packed = packing.pack(spec.fmt, quantized, "tile16x32")
        self._dense = dense.astype(np.float64)
        self._repeats = whole + (rest > 0)
        lengths = {name: shape[0] for name, shape, _ in spec.weight_buffers()}
        self.weights = [
            _repeat(array, length)
            for array, length in zip(packed.values(), lengths.values(), strict=True)
        ]

    def arguments(self, m: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """Return (arguments before the weights, arguments behind them, the result [M, out])."""
        spec = self.spec
        x = self._rng.standard_normal((m, spec.k)).astype(np.float32)
        x[m // 2, : min(spec.k, 40)] = 0  # an all-zero group
        value, before = activations(spec, x)
        y = np.tile(value @ self._dense.T, (1, self._repeats))[:, : spec.n]
        behind, y = _epilogue(spec, y, self._rng, np.float32)
        return before, behind, y

    def error(self, y: np.ndarray, answer: np.ndarray) -> tuple[float, float]:
        """Return (how far a kernel's y is from the answer, how far it may be)."""
        off = float(np.abs(y - answer).max() / np.abs(answer).max())
        return off if np.isfinite(off) else float("inf"), limit(self.spec, len(answer))


class FragmentOperands(Operands):
    """Arguments of a CUDA kernel (layout "cuda-fragment", float16 in and out) and its result."""

    def __init__(self, spec: LinearSpec, seed: int = 0):
        from amx_tvm.formats import cuda_layout

        self.spec, self._rng = spec, np.random.default_rng(seed)
        rows = min(spec.tiles, BLOCK_TILES) * TILE_ROWS
        block = (self._rng.standard_normal((rows, spec.k)) * 0.05).astype(np.float32)
        if spec.format == "none":
            packed, dense = cuda_layout.pack_float16(block), block.astype(np.float16)
        else:
            quantized = spec.fmt.quantize(block)
            packed, dense = cuda_layout.pack(spec.fmt, quantized), spec.fmt.dequantize(quantized)
        self._dense = dense.astype(np.float32)
        self._repeats = -(-spec.tiles * TILE_ROWS // rows)
        self.weights = [_repeat(array, spec.tiles) for array in packed.values()]

    def arguments(self, m: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """Return (arguments before the weights, arguments behind them, the result [M, out])."""
        spec = self.spec
        x = self._rng.standard_normal((m, spec.k)).astype(np.float16)
        before, value = [x], x.astype(np.float64)
        # float32 products: a hundred times below the rounding of y to float16
        y = value.astype(np.float32) @ self._dense.T
        y = np.tile(y.astype(np.float64), (1, self._repeats))[:, : spec.n]
        behind, y = _epilogue(spec, y, self._rng, np.float16)
        return before, behind, y

    def error(self, y: np.ndarray, answer: np.ndarray) -> tuple[float, float]:
        """Return (norm of the deviation over the answer's, how large it may be)."""
        off = float(np.linalg.norm(y.astype(np.float64) - answer) / np.linalg.norm(answer))
        return off if np.isfinite(off) else float("inf"), FRAGMENT_LIMIT


def _epilogue(
    spec: LinearSpec, y: np.ndarray, rng: np.random.Generator, dtype: type
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return (bias and residual as the spec has them, y [M, N] behind bias, gate and residual)."""
    behind: list[np.ndarray] = []
    if spec.bias:
        bias = rng.standard_normal(spec.n).astype(np.float32)
        y, behind = y + bias, [bias]
    if spec.silu_mul:
        pairs = y.reshape(len(y), -1, 2, TILE_ROWS)
        gate, up = pairs[:, :, 0], pairs[:, :, 1]
        y = (gate / (1 + np.exp(-gate)) * up).reshape(len(y), -1)
    if spec.residual:
        residual: np.ndarray = rng.standard_normal(y.shape).astype(dtype)
        y, behind = y + residual, [*behind, residual]
    return behind, y


def _repeat(array: np.ndarray, length: int) -> np.ndarray:
    times = -(-length // array.shape[0])
    return np.ascontiguousarray(np.tile(array, (times, *(1,) * (array.ndim - 1)))[:length])


def activations(spec: LinearSpec, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Quantize x float32 [M, K] as the kernel takes it: (its float64 value, the arguments)."""
    if spec.activation.exact:
        return x.astype(np.float64), [x]
    m = x.shape[0]
    padded = np.zeros((m, spec.k_padded), np.float32)
    padded[:, : spec.k] = x
    if spec.activation.scheme is Scheme.FOUR_BIT:
        value, arguments, sums = _four_bits(padded, spec.activation.fmt)
        if spec.activation.integer:
            arguments, sums = _joined(value.reshape(m, -1, GROUP), arguments)
    else:
        value, arguments, sums = _integers(padded.reshape(m, -1, GROUP), spec)
    return value[:, : spec.k], [*arguments, *(sums if spec.needs_sums else [])]


def _integers(x: np.ndarray, spec: LinearSpec) -> tuple[np.ndarray, list, list]:
    rows = len(x)
    from relax_passes.kernels.cpu import outliers  # needs TVM; CUDA's operands do not

    steps = outliers.LOW_STEPS if spec.activation.outliers else 1
    largest, top = np.abs(x).max(-1), np.float32(127 * steps)
    scales = (largest / top).astype(np.float32)
    divisor = np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = np.clip(np.rint(x / divisor), -top, top).astype(np.int32)
    words, lists = [codes], []
    if steps > 1:
        mean = np.sqrt((x.astype(np.float64) ** 2).sum((1, 2)) / spec.k)[:, None]
        marked = largest > outliers.FACTOR * mean
        high = (codes + 128) >> 8
        words, lists = [high, (codes - (high << 8)) * marked[..., None]], [_listed(marked)]
    scales = scales * np.float32(steps)
    exact = words[0] + (words[1] / steps if steps > 1 else 0)
    value = (exact * scales[..., None].astype(np.float64)).reshape(rows, -1)
    sums = [w.sum(-1, dtype=np.int32) for w in words]
    return value, [*(w.astype(np.int8).reshape(rows, -1) for w in words), scales], [*sums, *lists]


def _four_bits(x: np.ndarray, fmt: Format) -> tuple[np.ndarray, list, list]:
    quantized = fmt.quantize(x, activation=True)
    value = np.zeros(x.shape)
    codes, scales, sums = [], [], []
    for term in fmt.terms:
        offset: Any = term.offset
        if isinstance(offset, str):
            offset = np.repeat(quantized.scales[offset].astype(np.int32), fmt.group_size, -1)
        table: Any = np.array(term.table, np.int32)
        code = (table[quantized.codes] - offset).astype(np.int8)
        scale = np.float32(term.factor) * fmt.decode_scale(term.scale, quantized.scales[term.scale])
        if quantized.tensor_scale is not None:
            scale = scale * np.reshape(quantized.tensor_scale, (-1, 1)).astype(np.float32)
        value += code.astype(np.float64) * np.repeat(scale.astype(np.float64), fmt.group_size, -1)
        codes.append(code)
        scales.append(scale.astype(np.float32))
        sums.append(code.reshape(len(x), -1, fmt.group_size).sum(-1, dtype=np.int32))
    return value, [*codes, *scales], sums


def _joined(value: np.ndarray, parts: list) -> tuple[list, list]:
    """Turn values [M, G, 32] of codes and scales of either sign into integers (fp4_integers.py)."""
    scales = np.abs(np.stack(parts[len(parts) // 2 :])).astype(np.float64)
    unit, wide = scales[0], np.zeros(scales[0].shape, bool)  # one scale: codes are bytes
    if len(scales) > 1:
        mantissa, exponent = np.frexp(scales)
        zeros = np.array([2, 0, 1, 0])[np.maximum(mantissa * 8 - 4, 0).astype(int)]
        top = np.where(scales > 0, exponent - 3, -99).max(0)
        unit = 2.0 ** np.where(scales > 0, exponent - 3 + zeros, 99).min(0)
        wide = scales.max(0) > 10 * unit
        unit = np.where(wide | (top < -90), 2.0**top, unit)
    words = np.rint(value * 256 / np.where(unit > 0, unit, 1)[..., None]).astype(np.int32)
    high = (words + 128) >> 8
    both = [high, words - (high << 8)]
    codes = [w.astype(np.int8).reshape(len(w), -1) for w in both]
    sums = [w.sum(-1, dtype=np.int32) for w in both]
    return [*codes, unit.astype(np.float32)], [*sums, _listed(wide)]


def _listed(marked: np.ndarray) -> np.ndarray:
    """List the marked groups [M, G] of each row: how many, then which."""
    listed = np.zeros((len(marked), 1 + marked.shape[1]), np.int32)
    for row, one in enumerate(marked):
        listed[row, : 1 + one.sum()] = [one.sum(), *np.flatnonzero(one)]
    return listed
