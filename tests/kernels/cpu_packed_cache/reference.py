"""A cache of few bits run through the virtual machine, and what it holds read by NumPy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import tvm
import tvm_ffi
from scipy.linalg import hadamard
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from amx_tvm.formats import Quantized
from amx_tvm.formats.packing import get_layout
from amx_tvm.models.step import Step, kv_cache
from amx_tvm.runtime.kv_packed import PackedPages
from amx_tvm.runtime.vm import VirtualMachine, aligned
from amx_tvm.targets import host_options
from relax_passes.kernels.cpu.packed_cache import Layout
from relax_passes.kernels.cpu.packed_cache.layout import PAGE, PANEL
from relax_passes.kernels.cpu.packed_cache.leave import leave
from relax_passes.kernels.cpu.packed_cache.lowering import PackedAttention
from relax_passes.passes.lower_attention import lowered
from tests.kernels.cpu_attention.reference import rotate, tensor


class _Model(nn.Module):
    """Only attention: every layer gets its own part of the input."""

    def __init__(self, specs):
        self.specs = specs

    def create_kv_cache(self, batch, total, chunk):
        return kv_cache(batch, total, chunk)

    def forward(self, qkv: nn.Tensor, sinks: nn.Tensor, cache: PagedKVCache):
        outs, spec, n = [], self.specs[0], qkv.shape[0]
        step = Step(cache, n)
        parts = qkv.reshape(n, len(self.specs), spec.heads + 2 * spec.kv_heads, spec.head_dim)
        for layer, spec in enumerate(self.specs):
            part = parts
            if len(self.specs) > 1:
                part = nn.op.split(parts, len(self.specs), axis=1)[layer]
            part = part.reshape(n, spec.heads + 2 * spec.kv_heads, spec.head_dim)
            out = step.attend(spec, part, sinks if spec.sinks else None)
            outs.append(out.reshape(n, 1, spec.heads, spec.head_dim))
        return nn.op.concat(outs, dim=1) if len(outs) > 1 else outs[0]


@cache
def virtual_machine(specs, spec, target=None):
    """Compile the attention-only model, lowered as a model's attention is."""
    target = tvm.target.Target(dict(target) if target else host_options())
    width = sum((s.heads + 2 * s.kv_heads) * s.head_dim for s in specs)
    none = {"param_mode": "none", "effect_mode": "none"}
    module, _ = _Model(specs).export_tvm(
        spec={
            "create_kv_cache": {"batch": int, "total": int, "chunk": int, "$": dict(none)},
            "forward": {
                "qkv": nn.spec.Tensor(["n", width], "float32"),
                "sinks": nn.spec.Tensor([specs[0].heads], "float32"),
                "cache": nn.spec.Object(object_type=PagedKVCache),
                "$": dict(none),
            },
        }
    )
    module = lowered(module, PackedAttention(specs, target, spec))
    return relax.VirtualMachine(tvm.compile(module, target), tvm.cpu())


# What `PackedPages` asks of an engine's machine.
MACHINE = SimpleNamespace(
    rows_of=lambda t: VirtualMachine.rows_of(None, t),
    to_device=lambda a: tvm_ffi.from_dlpack(aligned(a)),
    tuple_of=lambda tensors: tvm_ffi.convert(list(tensors)),
)


class Cache:
    """A compiled cache; every pass is compared with attention over what it holds."""

    def __init__(self, specs, spec, total=2048, batch=6, seed=0, target=None):
        self.specs, self.spec = specs, spec
        first = specs[0]
        self.layout = Layout(spec, len(specs), first.kv_heads, first.head_dim)
        self.vm = virtual_machine(specs, spec, target and tuple(target.items()))
        made = self.vm["create_kv_cache"](
            *(tvm.runtime.ShapeTuple([n]) for n in (batch, total, 64))
        )
        stored = {**spec.describe(), "page_bytes": self.layout.page_bytes}
        stored["sequence_bytes"] = self.layout.sequence_bytes
        self.pages = PackedPages(MACHINE, made, PAGE, stored)
        self.pages._pages[:] = 255  # NaN, where a scale is read that was not written
        self.rng = np.random.default_rng(seed)
        self.sinks = self.rng.standard_normal(first.heads).astype(np.float32)

    def length(self, sequence):
        return self.pages._lengths[sequence]

    def step(self, x, lengths):
        """Append qkv [rows, layers, heads, d] to sequences; returns [rows, layers, heads, d]."""
        self.pages.begin(list(lengths), list(lengths.values()))
        flat = tensor(x.reshape(len(x), -1))
        return self.vm["forward"](flat, tensor(self.sinks), *self.pages.arguments).numpy()

    def forward(self, lengths):
        """Append random tokens to sequences and attend; returns the largest error."""
        first, count = self.specs[0], sum(lengths.values())
        heads = first.heads + 2 * first.kv_heads
        x = self.rng.standard_normal((count, len(self.specs), heads, first.head_dim), np.float32)
        before = {s: self.length(s) for s in lengths}
        held = {s: self.held(s) for s in lengths}
        out = self.step(x, lengths)
        worst, row, one = 0.0, 0, all(n == 1 for n in lengths.values())
        for s, n in lengths.items():
            for layer, spec in enumerate(self.specs):
                part = x[row : row + n, layer].astype(np.float64)
                q, k, v = np.split(part, [spec.heads, spec.heads + spec.kv_heads], axis=1)
                at = np.arange(before[s], before[s] + n)
                if spec.rotation.pairs:
                    q, k = (rotate(a, at, spec.rotation) for a in (q, k))
                q, k, v = (self.turn(a) for a in (q, k, v))
                if one:  # the new token is read in 16 bits, too
                    keys, values = self.held(s)[layer]
                else:
                    keys = np.concatenate([held[s][layer][0], k])
                    values = np.concatenate([held[s][layer][1], v])
                expected = self.turn(self.attend(spec, q, keys, values, at))
                worst = max(worst, float(np.abs(out[row : row + n, layer] - expected).max()))
            row += n
        assert np.isfinite(out).all()
        return worst

    def turn(self, x):
        """Multiply heads by the Hadamard matrix."""
        d = x.shape[-1]
        size = d & -d
        if not self.spec.turned:
            return x
        return (x.reshape(*x.shape[:-1], -1, size) @ (hadamard(size) / size**0.5)).reshape(x.shape)

    def attend(self, spec, q, k, v, at):
        """Attention of q [n, heads, d] at positions `at` over k and v [m, kv_heads, d]."""
        k, v = (np.repeat(a, spec.group, axis=1) for a in (k, v))
        scores = np.einsum("nhd,mhd->nhm", q, k) * spec.scale
        if spec.soft_cap:
            scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
        past = at[:, None] - np.arange(len(k))
        seen = (past >= 0) & ((past < spec.window) if spec.window else True)
        scores = np.where(seen[:, None], scores, -np.inf)
        sink = self.sinks[None, :, None] if spec.sinks else np.full((1, 1, 1), -np.inf)
        top = np.maximum(scores.max(-1, keepdims=True), sink)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True) + np.exp(sink - top)
        return np.einsum("nhm,mhd->nhd", weights / total, v)

    def held(self, sequence):
        """Keys and values [tokens, kv_heads, d] of every layer, as attention reads them now."""
        length, exact = self.length(sequence), self.pages._exact[sequence]
        keys, values = self.rounded(self.pages._tables[sequence], length, exact)
        layout, spec = self.layout, self.spec
        recent = self.pages._recent[sequence].view(np.float16).astype(np.float64)
        recent = recent.reshape(layout.layers, layout.kv_heads, 2, -1)
        shape = (layout.layers, layout.kv_heads)
        near = recent[:, :, 0].reshape(*shape, layout.head_dim, spec.recent).transpose(0, 3, 1, 2)
        far = recent[:, :, 1].reshape(*shape, spec.recent, layout.head_dim).transpose(0, 2, 1, 3)
        for token in range(length):
            if token < spec.first or token >= exact:
                slot = spec.newest + token if token < spec.first else token % spec.newest
                keys[:, token], values[:, token] = near[:, slot], far[:, slot]
        return list(zip(keys, values, strict=True))

    def rounded(self, table, length, exact):
        """Keys and values [layers, tokens, kv_heads, d] of pages, decoded by the NumPy oracle.

        Those from `exact` on are in 16 bits alone: zeros.
        """
        layout, fmt = self.layout, self.layout.format
        d, kv_heads = layout.head_dim, layout.kv_heads
        shape = (layout.layers, len(table) * PAGE, kv_heads, d)
        keys, values = np.zeros(shape), np.zeros(shape)
        tiles = get_layout("tile16x32")
        for i, page in enumerate(table):
            blocks = self.pages._pages[page].reshape(layout.layers, kv_heads, layout.block)
            for layer in range(layout.layers):
                for h in range(kv_heads):
                    at = slice(i * PAGE, min(i * PAGE + PAGE, exact))
                    if at.stop <= at.start:
                        continue
                    k, v = unpacked(layout, blocks[layer, h], tiles)
                    used = slice(0, at.stop - at.start)
                    keys[layer, at, h] = fmt.dequantize(part(k, used))
                    if layout.spec.centred:
                        keys[layer, at, h] += fmt.dequantize(mean(layout, blocks[layer, h]))
                    values[layer, at, h] = fmt.dequantize(part(v, used))
        return keys[:, :length], values[:, :length]


def round_page(layout, x):
    """Round a page of keys and values [64, 2, d] in 16 bits by the kernel alone; its block."""
    function = leave(layout, host_options()).with_attr("global_symbol", "leave")
    compiled = tvm.compile(tvm.IRModule({"leave": function}), tvm.target.Target(host_options()))
    rows = np.stack([np.arange(PAGE), np.zeros(PAGE)]).astype(np.int32)
    told = np.array([[0, PAGE, PAGE, 0, 0, 0, 0, 0]], np.int32)
    pages = tensor(np.zeros((1, 1, 1, layout.block), np.uint8))
    recent = np.zeros((1, 1, 1, layout.recent), np.float16)
    near, far = recent[0, 0, 0].reshape(2, -1)
    near.reshape(layout.head_dim, -1)[:, :PAGE] = x[:, 0].T
    far.reshape(-1, layout.head_dim)[:PAGE] = x[:, 1]
    step = [tensor(a) for a in (rows, told, np.zeros((1, 1), np.int32))]
    output = tensor(np.zeros((2, PAGE), np.int32))
    compiled["leave"](*step, pages, tensor(recent), output)
    np.testing.assert_array_equal(output.numpy(), rows)
    return pages.numpy()[0, 0, 0]


def mean(layout, block):
    """Codes and scales of what a block's keys are stored less, one row."""
    fmt, groups = layout.format, layout.groups
    raw = block[2 * layout.keys :][: layout.mean]
    codes = raw[: groups * layout.codes].reshape(1, groups, layout.codes)
    codes = np.concatenate([codes & 15, codes >> 4], axis=2).reshape(1, -1)
    size = groups * layout.parts * layout.scale_bytes
    parts = raw[groups * layout.codes :][:size]
    parts = parts.reshape(groups, len(fmt.scale_tensors), -1)
    scales = {
        tensor_.name: np.ascontiguousarray(parts[:, i].reshape(1, -1)).view(tensor_.dtype)
        for i, tensor_ in enumerate(fmt.scale_tensors)
    }
    return Quantized(codes.copy(), scales, fmt, np.float32(1) if fmt.row_scaled else None)


def part(quantized, rows):
    """Take rows of quantized ones."""
    scales = {name: scale[rows] for name, scale in quantized.scales.items()}
    row_scale = quantized.tensor_scale if quantized.tensor_scale is None else np.float32(1)
    return replace(quantized, codes=quantized.codes[rows], scales=scales, tensor_scale=row_scale)


def unpacked(layout, block, tiles):
    """Codes and scales of the keys and values of a block, as the formats have them."""
    fmt, d, groups = layout.format, layout.head_dim, layout.groups
    keys = block[: layout.keys].reshape(PAGE // PANEL, -1)
    codes = PANEL * groups * layout.codes
    arrays = {
        "codes": keys[:, :codes].reshape(PAGE // PANEL, groups, -1),
        "scales": keys[:, codes:].reshape(PAGE // PANEL, groups, -1),
    }
    if fmt.row_scaled:
        arrays["tile_scale"] = np.ones(PAGE // PANEL, np.float32)
    k = tiles.unpack(fmt, arrays, PAGE, d)
    rest = block[layout.keys : 2 * layout.keys]
    end = PAGE * groups * layout.codes
    raw = rest[:end].reshape(PAGE, groups, layout.codes)
    if fmt.code_bits == 4:
        raw = np.concatenate([raw & 15, raw >> 4], axis=2)
    parts = rest[end:].reshape(groups, len(fmt.scale_tensors), layout.subgroups, PAGE, -1)
    scales = {}
    for i, tensor_ in enumerate(fmt.scale_tensors):
        found = parts[:, i].transpose(2, 0, 1, 3).reshape(PAGE, -1)
        scales[tensor_.name] = np.ascontiguousarray(found).view(tensor_.dtype)
    return k, type(k)(raw.reshape(PAGE, d).copy(), scales, fmt, k.tensor_scale)
