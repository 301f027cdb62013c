"""What a cache of few bits on CUDA should hold and give, beside what its kernels make of it.

`Cache` counts pages with the runtime's own class and compares every pass with attention over the
keys and values that kernels kept, in 16 bits and in pages. In 16 bits they must be NumPy's but for
the last bit, which a GPU's sines and fused products may round otherwise; `check_bits` compares
pages with what the NumPy oracle makes of the 16 bits. It needs neither TVM nor a GPU: kernels are
given to it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from amx_tvm.runtime.kv_device import DevicePages
from relax_passes.attention_spec import AttentionSpec, Rotation
from relax_passes.cache_spec import CacheSpec
from relax_passes.kernels.cuda.packed_cache.layout import PAGE, layout_of

WORK = 1 << 22  # numbers that are enough for the kernels' tables


def attention(heads: int = 2, kv_heads: int = 1, d: int = 64, **more) -> AttentionSpec:
    """Attention of a layer that rotates all channels."""
    rotation = Rotation(tuple(float(np.float32(1e4 ** (-2 * i / d))) for i in range(d // 2)))
    return AttentionSpec(0, heads, kv_heads, d, d**-0.5, rotation=rotation, **more)


def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix."""
    made = np.ones((1, 1))
    while len(made) < size:
        made = np.block([[made, made], [made, -made]])
    return made


# What `DevicePages` asks of an engine's machine, in the host's memory.
MACHINE = SimpleNamespace(
    builtin=lambda _: lambda source, target: target.__setitem__(slice(None), source),
    mailbox=lambda words: (np.zeros(words, np.int32),) * 2,
    view=lambda tensor, shape: tensor[: shape[0]],
    row=lambda tensor, row: tensor[row : row + 1],
    tuple_of=tuple,
)


class Cache:
    """Sequences of a cache; every pass is compared with attention over what it should hold."""

    def __init__(
        self,
        spec: AttentionSpec,
        cache: CacheSpec,
        lib: Any,
        layers: int = 2,
        pages: int = 40,
        places: int = 4,
    ):
        self.spec, self.cache, self.lib = spec, cache, lib
        sizes = self.layout = layout_of(cache, (spec,) * layers)
        self.rng = np.random.default_rng(0)
        # NaN, where nothing was written
        self.pages = np.full((pages, sizes.page_bytes), 255, np.uint8)
        self.recent = np.full((places, sizes.sequence_bytes // 2), np.nan, np.float16)
        told = np.full(1 << 16, 1 << 20, np.int32)
        self.work = np.zeros(WORK, np.int32)
        tensors = np.zeros(64, np.int32), self.pages, self.recent, told, self.work
        lib.hold(tensors)
        stored = {**cache.describe(), "page_bytes": sizes.page_bytes}
        stored["sequence_bytes"] = sizes.sequence_bytes
        self.counted = DevicePages(MACHINE, tensors, PAGE, stored)
        self.sinks = self.rng.standard_normal(spec.heads).astype(np.float16)
        self.keys: dict[int, list[np.ndarray]] = {}  # turned, in 16 bits: [layer] [tokens, kv, d]
        self.values: dict[int, list[np.ndarray]] = {}

    def add(self, sequence: int) -> None:
        self.counted.add(sequence)
        empty = np.zeros((0, self.spec.kv_heads, self.spec.head_dim), np.float32)
        self.keys[sequence], self.values[sequence] = ([empty] * self.layout.layers for _ in "kv")

    def rollback(self, sequence: int, count: int) -> None:
        self.counted.pop(sequence, count)
        self._cut(sequence, sequence, self.counted._lengths[sequence])

    def fork(self, parent: int, child: int, position: int) -> None:
        self.counted.fork(parent, child, position, self.counted._lengths[parent])
        self._cut(parent, child, position)

    def _cut(self, source: int, target: int, length: int) -> None:
        for held in (self.keys, self.values):
            held[target] = [part[:length] for part in held[source]]

    def forward(self, lengths: dict[int, int]) -> float:
        """Append random tokens and attend; the largest relative difference of a row."""
        spec, m = self.spec, sum(lengths.values())
        before = {s: (self.counted._lengths[s], self.counted._exact[s]) for s in lengths}
        self.counted.begin(list(lengths), list(lengths.values()))
        padded, each = m + 1, m == len(lengths)
        self.lib.begin(padded)
        worst = 0.0
        for layer in range(self.layout.layers):

            def made(rows: int, heads: int, value: float = np.nan) -> np.ndarray:
                return np.full((rows, heads, spec.head_dim), value, np.float16)

            qkv = made(padded, spec.heads + 2 * spec.kv_heads)
            qkv[:] = self.rng.standard_normal(qkv.shape)
            out = made(padded, spec.heads)
            if each:
                self.lib.batch(qkv, self.sinks, out, layer, padded)
            else:
                parts = [made(m, heads) for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
                self.lib.prefill(qkv, *parts, self.sinks, out, layer, m)
            row = 0
            for s, count in lengths.items():
                mine = qkv[row : row + count].astype(np.float32)
                new = self.newest(s, layer) if each else [a[row : row + count] for a in parts[1:]]
                expected = self.expected(s, layer, mine, new, each, *before[s])
                found = out[row : row + count].astype(np.float64)
                assert np.isfinite(found).all()
                norms = np.linalg.norm(found - expected, axis=-1), np.linalg.norm(expected, axis=-1)
                worst = max(worst, float((norms[0] / norms[1]).max()))
                row += count
        return worst

    def newest(self, s: int, layer: int) -> list[np.ndarray]:
        """Key and value [1, kv, d] of a sequence's last token in 16 bits, as layout.py has them."""
        newest, d = self.cache.newest, self.spec.head_dim
        slot = (self.counted._lengths[s] - 1) % newest
        blocks = self.recent[s].reshape(self.layout.layers, self.spec.kv_heads, -1)[layer]
        keys, values = np.split(blocks[:, : 2 * newest * d], 2, axis=1)
        place = 4 * (slot >> 1 & 3) + 2 * (slot >> 3 & 1) + (slot & 1)
        found = values.reshape(-1, newest // 16, d, 16)[:, slot >> 4, :, place]
        return [keys.reshape(-1, newest, d)[None, :, slot], found[None]]

    def expected(
        self,
        s: int,
        layer: int,
        x: np.ndarray,
        kept: list[np.ndarray],
        each: bool,
        length: int,
        exact: int,
    ) -> np.ndarray:
        """Attention of new rows [n, heads + 2 kv, d], whose kept keys become the sequence's."""
        spec, n = self.spec, len(x)
        at = np.arange(length, length + n)
        q, k, v = np.split(x, [spec.heads, spec.heads + spec.kv_heads], axis=1)
        q, k = (self.rotate(part, at) for part in (q, k))
        q, k, v = (self.turn(part).astype(np.float16).astype(np.float32) for part in (q, k, v))
        for mine, theirs in zip((k, v), kept, strict=True):
            np.testing.assert_allclose(theirs.astype(np.float32), mine, rtol=2e-3, atol=4e-3)
        k, v = (part.astype(np.float32) for part in kept)
        held = []
        exact = max(exact, length + 1 - self.cache.newest) if each else min(exact, length)
        stored = self.stored(s, layer, exact)
        for store, new, read in zip((self.keys, self.values), (k, v), stored, strict=True):
            old = store[s][layer]
            store[s][layer] = np.concatenate([old, new])
            first = min(self.cache.first, length)
            held.append(np.concatenate([old[:first], read[first:], old[max(exact, first) :], new]))
        return self.turn(self.attend(q, *held, at))

    def stored(self, s: int, layer: int, tokens: int) -> list[np.ndarray]:
        """What pages hold of the first tokens' keys and values, [tokens, kv, d]."""
        fmt, d = self.layout.format, self.spec.head_dim
        found = np.zeros((2, tokens, self.spec.kv_heads, d), np.float32)
        for head in range(self.spec.kv_heads if tokens > 0 else 0):
            for part, bits in zip(found, self.held(s, layer, head, tokens), strict=True):
                part[:, head] = decoded(fmt, *bits)
        return list(found)

    def check_bits(self, s: int) -> int:
        """Compare all pages of a sequence with the oracle; the number of groups that differ.

        Codes are the oracle's under the stored scales, and so are scales, but where two of them
        have squared errors that are one number in float32: kernels add these in another order.
        """
        fmt, tokens, different = self.layout.format, self.counted._exact[s], 0
        if tokens == 0:  # all are in 16 bits, and formats round no empty arrays
            return 0
        for layer in range(self.layout.layers):
            for head in range(self.spec.kv_heads):
                both = self.held(s, layer, head, tokens)
                for bits, kept in zip(both, (self.keys, self.values), strict=True):
                    x = np.ascontiguousarray(kept[s][layer][:tokens, head])
                    groups = x.reshape(tokens, x.shape[1] // fmt.group_size, fmt.group_size)
                    under = fmt.encode(groups, stored_scales(fmt, bits[1]), row_scale(fmt, tokens))
                    np.testing.assert_array_equal(bits[0], under.reshape(bits[0].shape))
                    oracle = quantized(fmt, x)
                    expected = fmt.dequantize(oracle).reshape(groups.shape)
                    found = decoded(fmt, *bits).reshape(groups.shape)
                    other = (found != expected).any(-1)
                    errors = [np.square(np.float64(v) - groups).sum(-1) for v in (found, expected)]
                    np.testing.assert_allclose(errors[0][other], errors[1][other], rtol=1e-6)
                    different += int(other.sum())
        return different

    def rotate(self, x: np.ndarray, at: np.ndarray) -> np.ndarray:
        half = self.spec.rotation.pairs
        angles = at[:, None, None] * np.asarray(self.spec.rotation.frequencies)
        cos, sin, out = np.cos(angles), np.sin(angles), x.copy()
        low, high = x[..., :half], x[..., half : 2 * half]
        out[..., :half], out[..., half : 2 * half] = low * cos - high * sin, high * cos + low * sin
        return out

    def turn(self, x: np.ndarray) -> np.ndarray:
        size = self.layout.turn
        if not size:
            return x
        return (x.reshape(*x.shape[:-1], -1, size) @ (hadamard(size) / size**0.5)).reshape(x.shape)

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, at: np.ndarray) -> np.ndarray:
        spec = self.spec
        q, k, v = (a.swapaxes(0, 1) for a in (q, k, v))  # heads first
        k, v = (np.repeat(a, spec.group, axis=0) for a in (k, v))
        scores = q @ k.swapaxes(1, 2) * spec.scale
        if spec.soft_cap:
            scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
        past = at[:, None] - np.arange(k.shape[1])
        seen = (past >= 0) & ((past < spec.window) if spec.window else True)
        scores = np.where(seen, scores, -np.inf)
        sinks = self.sinks if spec.sinks else np.full(spec.heads, -np.inf)
        sink = sinks.astype(np.float32)[:, None, None]
        top = np.maximum(scores.max(-1, keepdims=True), sink)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True) + np.exp(sink - top)
        return (weights / total @ v).swapaxes(0, 1)

    def held(self, s: int, layer: int, head: int, tokens: int) -> tuple:
        """Codes and scales as the format has them of the first tokens: keys', values'."""
        layout = self.layout
        shape = (layout.layers, layout.kv_heads, 4, -1)
        blocks = [self.pages[page].reshape(shape)[layer, head] for page in self.counted._tables[s]]
        panels = np.concatenate(blocks)
        return tuple(part(layout, panels, value, tokens) for value in (False, True))


def quantized(fmt, flat: np.ndarray):  # noqa: ANN001, ANN201
    """Quantize rows; scales have the range of their type."""
    return fmt.quantize(flat, tensor_scale=np.float32(1) if fmt.row_scaled else None)


def stored_scales(fmt, raw: np.ndarray) -> dict[str, np.ndarray]:  # noqa: ANN001
    """Scales [tokens, groups] by name of the bytes that pages have of them."""
    tensors, tokens = fmt.scale_tensors, len(raw)
    apart = raw.reshape(tokens, raw.shape[1] // len(tensors), len(tensors))
    kind = np.float16 if fmt.code_bits == 8 else np.uint8
    return {t.name: np.ascontiguousarray(apart[..., i]).view(kind) for i, t in enumerate(tensors)}


def row_scale(fmt, tokens: int) -> np.ndarray | None:  # noqa: ANN001
    """The float32 scale of rows, which a cache does not have."""
    return np.ones((tokens, 1), np.float32) if fmt.row_scaled else None


def decoded(fmt, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:  # noqa: ANN001
    """Values [tokens, d] of codes [tokens, d] and of the bytes of their scales."""
    tokens, d = codes.shape
    groups = codes.reshape(tokens, d // fmt.group_size, fmt.group_size)
    values = fmt.decode(groups, stored_scales(fmt, scales), row_scale(fmt, tokens))
    return values.astype(np.float32).reshape(codes.shape)


def part(layout, panels: np.ndarray, value: bool, tokens: int) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN001
    """Codes uint8 [tokens, d] and scale bytes [tokens, d / 16] of keys or values in panels."""
    d, eight = layout.head_dim, layout.format.code_bits == 8
    words, size = (2 if eight else 1), d // 16
    row = d // 2 * words
    begin = 16 * (row + size) * value
    codes = panels[:, begin : begin + 16 * row].reshape(-1, row)[:tokens].view(np.uint32)
    scales = panels[:, begin + 16 * row : begin + 16 * (row + size)].reshape(-1, size)[:tokens]
    codes = (
        codes.reshape(tokens, 8, d // 64, words)
        if value
        else codes.reshape(tokens, 4, d // 32, words)
    )
    codes = np.ascontiguousarray(codes.swapaxes(1, 2))  # in the order of channels
    if eight:
        found = codes.view(np.uint8).reshape(tokens, d // 8, 2, 4)[..., [0, 2, 1, 3]]
        return found.reshape(tokens, d), scales
    halves = codes.reshape(tokens, d // 8, 1) >> np.array([0, 16], np.uint32) & 0xFFFF
    sizes = [halves >> s & 7 for s in (9, 1, 12, 4)]
    signs = [halves >> s & 1 for s in (15, 7, 8, 0)]
    found = np.stack([m | s << 3 for m, s in zip(sizes, signs, strict=True)], -2)
    return found.reshape(tokens, d).astype(np.uint8), scales
