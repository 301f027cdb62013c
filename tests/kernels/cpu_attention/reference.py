"""Float64 reference of attention, rotary embedding and page layout, and a cache to compare with."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from amx_tvm.models.step import Step, kv_cache
from amx_tvm.targets import host_options
from relax_passes.attention_spec import AttentionSpec, Rotation
from relax_passes.kernels.cpu.attention import KVCacheConfig, kernels
from relax_passes.kernels.cpu.attention.config import PANEL
from relax_passes.kernels.cpu.attention.lowering import CpuAttention
from relax_passes.passes.lower_attention import lowered
from relax_passes.tir_pipeline import PIPELINE

NONE = Rotation()

TARGET = host_options()


def attend(q, k, v, low, high, cap=0.0):
    """Attention of q [n, heads, d] over k, v [m, kv_heads, d]; query i sees keys low[i]..high[i]-1.

    Returns the output and the log2-sum-exp2 [n, heads] of the scaled scores.
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("nhd,mhd->nhm", q, k) / math.sqrt(q.shape[2])
    scores = cap * np.tanh(scores / cap) if cap else scores
    columns = np.arange(k.shape[0])
    low, high = np.asarray(low)[:, None], np.asarray(high)[:, None]
    seen = ((columns >= low) & (columns < high))[:, None, :]
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-1e30)
    weights = np.where(seen, np.exp(scores - top), 0)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("nhm,mhd->nhd", weights / np.maximum(total, 1e-300), v)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0] / math.log(2)
    return out, lse


def plain(channels, theta=10000.0):
    """A rotary embedding without scaling."""
    powers = np.float64(theta) ** (np.arange(0, channels, 2) / channels)
    return Rotation(tuple(float(f) for f in np.float32(1.0) / powers.astype(np.float32)))


def layers(count, heads, kv_heads, d, rotation=NONE, windows=(0,), **more):
    """Layers of a model; as many windows as layers, or one for all."""
    windows = windows * count if len(windows) == 1 else windows
    return tuple(
        AttentionSpec(i, heads, kv_heads, d, d**-0.5, window=w, rotation=rotation, **more)
        for i, w in enumerate(windows)
    )


def rotate(x, positions, rotation):
    """Rotate x [n, heads, d] as Hugging Face does (float32 angles, float64 from there)."""
    factor = rotation.factor
    inv_freq = np.asarray(rotation.frequencies, np.float32)
    angles = (np.asarray(positions, np.float32)[:, None] * inv_freq).astype(np.float64)
    cos, sin = (np.tile(f(angles), 2)[:, None] * factor for f in (np.cos, np.sin))
    r = rotation.channels
    x = np.asarray(x, np.float64)
    head = x[..., :r]
    turned = np.concatenate([-head[..., r // 2 :], head[..., : r // 2]], axis=-1)
    return np.concatenate([head * cos + turned * sin, x[..., r:]], axis=-1)


def to_pages(k, v, page_ids, pages, config):
    """Write k, v [n, kv_heads, d] into pages [p, 2, kv_heads, page_size, d] as the layout says."""
    size, d = config.page_size, config.head_dim
    flat = pages.reshape(pages.shape[0], 2, config.num_kv_heads, size * d)
    for t in range(k.shape[0]):
        page, slot = page_ids[t // size], t % size
        flat[page, 1, :, slot * d : (slot + 1) * d] = v[t]
        start = slot // PANEL * PANEL * d + slot % PANEL
        flat[page, 0, :, start : start + PANEL * d : PANEL] = k[t]


@cache
def _compiled(name, config, target):
    function = kernels(config, dict(target))[name].with_attr("global_symbol", name)
    return tvm.compile(
        tvm.IRModule({name: function}), tvm.target.Target(dict(target)), tir_pipeline=PIPELINE
    )[name]


def kernel(name, config, target=None):
    """Compile one kernel of a cache."""
    return _compiled(name, config, tuple((target or TARGET).items()))


def tensor(array):
    """Copy an array into a TVM tensor."""
    return tvm.runtime.tensor(np.ascontiguousarray(array))


class _Model(nn.Module):
    """Only attention: every layer gets its own part of the input."""

    def __init__(self, config):
        self.config = config

    def create_kv_cache(self, batch, total, chunk):
        return kv_cache(batch, total, chunk)

    def forward(self, qkv: nn.Tensor, cache: PagedKVCache):
        c, n = self.config, qkv.shape[0]
        step, heads = Step(cache, n), qkv.shape[1] // c.layers // c.head_dim
        per_layer = qkv.reshape(n, c.layers, heads, c.head_dim)
        outs = []
        for layer, spec in enumerate(c.specs):
            part = nn.op.split(per_layer, c.layers, axis=1)[layer] if c.layers > 1 else per_layer
            out = step.attend(spec, part.reshape(n, heads, c.head_dim))
            outs.append(out.reshape(n, 1, spec.heads, c.head_dim))
        return nn.op.concat(outs, dim=1) if len(outs) > 1 else outs[0]


@cache
def virtual_machine(config, target=None):
    """Compile the attention-only model, lowered as a model's attention is."""
    target = tvm.target.Target(dict(target) if target else TARGET)
    width = sum(s.heads + 2 * s.kv_heads for s in config.specs) * config.head_dim
    none = {"param_mode": "none", "effect_mode": "none"}
    mod, _ = _Model(config).export_tvm(
        spec={
            "create_kv_cache": {"batch": int, "total": int, "chunk": int, "$": dict(none)},
            "forward": {
                "qkv": nn.spec.Tensor(["n", width], "float32"),
                "cache": nn.spec.Object(object_type=PagedKVCache),
                "$": dict(none),
            },
        }
    )
    mod = lowered(mod, CpuAttention(config, target))
    return relax.VirtualMachine(tvm.compile(mod, target, tir_pipeline=PIPELINE), tvm.cpu())


_state = {
    name: tvm.get_global_func(f"vm.builtin.kv_state_{name}")
    for name in (
        "add_sequence",
        "remove_sequence",
        "fork_sequence",
        "popn",
        "begin_forward",
        "end_forward",
    )
}


class Cache:
    """A compiled cache beside a NumPy one; every forward pass is compared."""

    def __init__(self, config: KVCacheConfig, total=1024, batch=8, chunk=256, seed=0):
        self.config = config
        self.vm = virtual_machine(config)
        sizes = (tvm.runtime.ShapeTuple([n]) for n in (batch, total, chunk))
        (self.kv,) = self.vm["create_kv_cache"](*sizes)
        self.history: dict[int, np.ndarray] = {}
        self.rng = np.random.default_rng(seed)
        self.worst = 0.0

    def add(self, seq):
        _state["add_sequence"](self.kv, seq)
        self.history[seq] = self._random(0)

    def remove(self, seq):
        _state["remove_sequence"](self.kv, seq)
        del self.history[seq]

    def fork(self, parent, child, position=-1):
        _state["fork_sequence"](self.kv, parent, child, position)
        history = self.history[parent]
        self.history[child] = history[: len(history) if position < 0 else position]

    def pop(self, seq, n):
        _state["popn"](self.kv, seq, n)
        self.history[seq] = self.history[seq][: len(self.history[seq]) - n]

    def _random(self, n):
        c = self.config
        shape = (n, c.layers, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        x = self.rng.standard_normal(shape, np.float32)
        return x.astype(c.dtype).astype(np.float32)

    def forward(self, lengths: dict[int, int]):
        """Append random tokens to sequences, attend, compare; returns the largest error."""
        new = {seq: self._random(n) for seq, n in lengths.items()}
        ids = tvm.runtime.ShapeTuple(list(lengths))
        _state["begin_forward"](self.kv, ids, tvm.runtime.ShapeTuple(list(lengths.values())))
        x = np.concatenate(list(new.values()))
        out = self.vm["forward"](tensor(x.reshape(len(x), -1)), self.kv).numpy()
        _state["end_forward"](self.kv)
        c = self.config
        out = out.reshape(len(x), c.layers, c.num_heads, c.head_dim)
        expected = []
        for seq, tokens in new.items():
            past = len(self.history[seq])
            self.history[seq] = np.concatenate([self.history[seq], tokens])
            expected.append(self._expected(self.history[seq], past))
        error = np.abs(out - np.concatenate(expected)).max()
        assert np.isfinite(error)
        self.worst = max(self.worst, float(error))
        return error

    def _expected(self, qkv, past):
        c = self.config
        positions = np.arange(len(qkv))
        result = np.empty((len(qkv) - past, c.layers, c.num_heads, c.head_dim))
        for layer in range(c.layers):
            q, k, v = np.split(qkv[:, layer], [c.num_heads, c.num_heads + c.num_kv_heads], axis=1)
            turn = c.specs[layer].rotation
            if turn.pairs:
                q, k = rotate(q, positions, turn), rotate(k, positions, turn)
            high = positions[past:] + 1
            window = c.specs[layer].window
            low = np.maximum(high - window, 0) if window else np.zeros_like(high)
            result[:, layer] = attend(q[past:], k, v, low, high, c.soft_cap)[0]
        return result


def symbolic(name):
    """Make an int32 variable."""
    return tirx.Var(name, "int32")
