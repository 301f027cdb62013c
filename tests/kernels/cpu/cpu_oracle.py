"""float64 references and call helpers for the CPU kernels."""

from __future__ import annotations

import numpy as np
import tvm
import tvm_ffi
from tvm.target import Target

from amx_tvm.formats import concatenate, packing
from amx_tvm.targets import host_options
from relax_passes.activation import INT8, Scheme
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu import outliers
from relax_passes.kernels.registry import linear_kernel
from relax_passes.spec import GROUP, LinearSpec
from relax_passes.tir_pipeline import PIPELINE
from tuning import oracle

HOST = Target({**host_options(), "num-cores": 2})
HOST_INFO = TargetInfo.of(HOST)


_COMPILED = {}  # of this session: equal functions are compiled once


def compile_func(func, target=HOST):
    """Compile one PrimFunc and return it as a callable."""
    func = func.with_attr("global_symbol", "f")
    key = (tvm_ffi.structural_hash(func), str(target))
    if key not in _COMPILED:
        _COMPILED[key] = tvm.compile(tvm.IRModule({"f": func}), target, tir_pipeline=PIPELINE)["f"]
    return _COMPILED[key]


def assembly(func, target):
    """Compile one PrimFunc and return its assembly text."""
    built = tvm.compile(
        tvm.IRModule({"f": func.with_attr("global_symbol", "f")}), target, tir_pipeline=PIPELINE
    )
    return built.mod.inspect_source("asm") if hasattr(built, "mod") else built.inspect_source("asm")


def tensors(*arrays):
    """Copy arrays to TVM tensors."""
    return [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays]


def empty(shape, dtype="float32"):
    """Allocate a result full of a value that no kernel leaves behind."""
    return tvm.runtime.tensor(np.full(shape, 77, dtype))


def quantize_int8(x):
    """Quantize float32 [M, K] to int8 groups of 32: (codes, scales, sums)."""
    m, k = x.shape
    padded = np.zeros((m, -(-k // GROUP), GROUP), np.float32)
    padded.reshape(m, -1)[:, :k] = x
    scales = (np.abs(padded).max(-1) / np.float32(127)).astype(np.float32)
    divisor = np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = np.clip(np.rint(padded / divisor), -127, 127).astype(np.int8)
    return codes.reshape(m, -1), scales, codes.sum(-1, dtype=np.int32)


def quantize_outliers(x):
    """Quantize float32 [M, K] to int8-outliers; returns the arguments, and x as kernels read it.

    Arguments: codes, low codes, scales, sums, low sums, and the lists of groups with outliers.
    Entries that kernels must not read hold 77.
    """
    m, k = x.shape
    padded = np.zeros((m, -(-k // GROUP), GROUP), np.float32)
    padded.reshape(m, -1)[:, :k] = x
    largest, top = np.abs(padded).max(-1), np.float32(127 * 256)
    mean = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True))
    marked = largest > outliers.FACTOR * mean
    scales = (largest / top).astype(np.float32)
    divisor = np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = np.clip(np.rint(padded / divisor), -top, top).astype(np.int32)
    high = (codes + 128) >> 8
    low = np.where(marked[..., None], codes - (high << 8), 77)
    listed = np.full((m, 1 + marked.shape[1]), 77, np.int32)
    for row, groups in enumerate(marked):
        listed[row, 0] = groups.sum()
        listed[row, 1 : 1 + groups.sum()] = np.flatnonzero(groups)
    scales = scales * np.float32(256)
    words = [w.astype(np.int8).reshape(m, -1) for w in (high, low)]
    sums = [w.sum(-1, dtype=np.int32) for w in (high, low)]
    value = (high + marked[..., None] * low / 256) * scales[..., None].astype(np.float64)
    return [*words, scales, *sums, listed], value.reshape(m, -1)[:, :k]


def quantize_fp4(x, fmt):
    """Quantize float32 [M, K] in a four-bit format: (codes..., scales..., sums...) a term."""
    m, k = x.shape
    padded = np.zeros((m, -(-k // GROUP) * GROUP), np.float32)
    padded[:, :k] = x
    q = fmt.quantize(padded, activation=True)
    codes, scales, sums = [], [], []
    for term in fmt.terms:
        offset = term.offset
        if isinstance(offset, str):
            offset = np.repeat(q.scales[offset].astype(np.int32), fmt.group_size, -1)
        value = (np.array(term.table, np.int32)[q.codes] - offset).astype(np.int8)
        scale = np.float32(term.factor) * fmt.decode_scale(term.scale, q.scales[term.scale])
        if q.tensor_scale is not None:
            scale = scale * np.reshape(q.tensor_scale, (-1, 1)).astype(np.float32)
        codes.append(value)
        scales.append(scale.astype(np.float32))
        sums.append(value.reshape(m, -1, fmt.group_size).sum(-1, dtype=np.int32))
    return (*codes, *scales), tuple(sums)


def quantize_tiles(fmt, weight):
    """Quantize; in formats with a tensor scale, tiles of 16 rows have different ones."""
    if not fmt.row_scaled:
        return fmt.quantize(weight)
    factors = [np.float32(1 + i // 16 % 5) for i in range(0, len(weight), 16)]
    tiles = np.split(weight, range(16, len(weight), 16))
    return concatenate([fmt.quantize(w * f) for w, f in zip(tiles, factors, strict=True)])


def silu(x):
    """float64 silu."""
    return x / (1 + np.exp(-x))


class Case:
    """Random weights of a spec, packed and dense, and its reference."""

    def __init__(self, spec: LinearSpec, seed: int = 0):
        self.spec, self.rng = spec, np.random.default_rng(seed)
        self.set_weight(self.rng.standard_normal((spec.n, spec.k)).astype(np.float32))

    def set_weight(self, weight):
        """Quantize and pack a float32 weight [N, K]."""
        spec = self.spec
        quantized = quantize_tiles(spec.fmt, weight)
        self.dense = spec.fmt.dequantize(quantized).astype(np.float64)
        self.packed = list(packing.pack(spec.fmt, quantized, "tile16x32").values())

    def draw(self, m):
        """Make x, float32 [M, K], with an all-zero group."""
        x = self.rng.standard_normal((m, self.spec.k)).astype(np.float32)
        x[m // 2, : min(self.spec.k, 40)] = 0
        return x

    def inputs(self, m):
        """Make (x as the kernel reads it in float64, activation arguments)."""
        spec, x = self.spec, self.draw(m)
        if spec.activation.exact:
            return x.astype(np.float64), [x]
        if spec.activation == INT8:
            codes, scales, sums = quantize_int8(x)
            value = codes.reshape(m, -1, GROUP) * scales[..., None].astype(np.float64)
            args = [codes, scales] + ([sums] if spec.needs_sums else [])
            return value.reshape(m, -1)[:, : spec.k], args
        if spec.activation.scheme is Scheme.FOUR_BIT and spec.activation.integer:
            x[::3] = np.maximum(x[::3], -0.3)  # groups of words
            return oracle.activations(spec, x)
        if spec.activation.outliers:
            x[::2, :: spec.k // 2 + 3] *= 40  # in every other row
            args, value = quantize_outliers(x)
            return value, args
        fmt = spec.activation.fmt
        arrays, sums = quantize_fp4(x, fmt)
        count = len(fmt.terms)
        value = sum(
            arrays[i].astype(np.float64)
            * np.repeat(arrays[count + i].astype(np.float64), fmt.group_size, -1)
            for i in range(count)
        )
        return value[:, : spec.k], [*arrays, *(sums if spec.needs_sums else ())]

    def run(self, func, m):
        """Return (kernel's result, reference) for M rows."""
        spec = self.spec
        x, args = self.inputs(m)
        y = x @ self.dense.T
        args = [*args, *self.packed]
        if spec.bias:
            bias = self.rng.standard_normal(spec.n).astype(np.float32)
            y, args = y + bias, [*args, bias]
        if spec.silu_mul:
            pairs = y.reshape(m, -1, 2, 16)
            y = (silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(m, -1)
        if spec.residual:
            residual = self.rng.standard_normal(y.shape).astype(np.float32)
            y, args = y + residual, [*args, residual]
        out = empty(y.shape)
        func(*tensors(*args), out)
        return out.numpy(), y

    def error(self, func, m):
        """Largest error over largest magnitude."""
        got, want = self.run(func, m)
        return np.abs(got - want).max() / np.abs(want).max()


def kernel_func(spec, rule=None, knobs=None, target=HOST):
    """Build and compile a linear."""
    return compile_func(linear_kernel(spec, target, knobs, rule).func, target)
