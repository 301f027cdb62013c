"""``amx.attention`` on CPUs: calls of TVM's cache object, which hold this package's kernels.

The object appends, attends and, where all layers rotate alike, rotates. Of a layer it hands its
kernels one number, the scale; a negative one tells them that the layer slides (`told_scale`).
"""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from relax_passes.attention_spec import AttentionSpec
from relax_passes.kernels.rotate import Turning
from relax_passes.ops import Attention
from relax_passes.rewriting import Context

from . import cache, sinks
from .config import KVCacheConfig


def told_scale(spec: AttentionSpec) -> float:
    """Return the number by which a layer's kernels know its scale and whether it slides."""
    return -spec.scale if spec.window else spec.scale


class CpuAttention:
    """Lowers the attention of one model.

    Parameters
    ----------
    config : KVCacheConfig
        All layers, and how keys and values are kept.
    target : Target, dict, TargetInfo or VectorTarget
        What the kernels are made for.
    """

    def __init__(self, config: KVCacheConfig, target: Any) -> None:
        self.config, self.target = config, target

    def begin(self, ctx: Context, rows: Any, cache: relax.Expr) -> None:
        """Start a function: its layers share what rotates, where the cache does not."""
        self.turning = Turning(ctx, rows, cache)

    def cache(self, ctx: Context, sizes: relax.ShapeExpr) -> relax.Expr:
        """Return the cache's object, in a tuple."""
        made = ctx.emit(cache.create(ctx, self.config, sizes, self.target), "paged_kv_cache")
        return relax.Tuple([made])

    def attend(self, ctx: Context, asked: Attention) -> relax.Expr:
        """Return the attention of one layer."""
        config, spec, qkv = self.config, asked.spec, asked.qkv
        dtype = qkv.ty.dtype
        if spec.rotation != config.rotation:
            qkv = self.turning.turn(asked)
        if spec.head_dim != config.head_dim:
            qkv = ctx.emit(ctx.call_te(pad_heads, qkv, config.head_dim))
        if spec.sinks:
            qkv = ctx.emit(ctx.call_te(sinks.with_carriers, qkv, spec.heads, spec.kv_heads))
        if dtype != config.dtype:  # the runtime takes the cache's type only
            qkv = ctx.emit(relax.op.astype(qkv, config.dtype))
        out = relax.call_dps_packed(
            "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
            [asked.cache, relax.prim_value(spec.layer), relax.prim_value(told_scale(spec)), qkv],
            out_ty=relax.TensorType((asked.rows, config.num_heads, config.head_dim), config.dtype),
        )
        if dtype != config.dtype:
            out = relax.op.astype(ctx.emit(out), dtype)
        if spec.sinks:
            out = ctx.call_te(sinks.apply_sinks, ctx.emit(out), asked.sinks, spec.group)
        if spec.head_dim != config.head_dim:
            out = ctx.call_te(unpad_heads, ctx.emit(out), spec.head_dim)
        return out


def pad_heads(x: te.Tensor, channels: int) -> te.Tensor:
    """Append zeros to the heads of [rows, heads, d]: they change no score and no result."""
    rows, heads, d = x.shape

    def at(t, h, i):  # noqa: ANN001, ANN202
        return tirx.if_then_else(i < d, x[t, h, tirx.min(i, d - 1)], tirx.const(0, x.dtype))

    return te.compute((rows, heads, channels), at, "pad_heads")


def unpad_heads(x: te.Tensor, d: int) -> te.Tensor:
    """Keep the first d channels of the heads of [rows, heads, channels]."""
    return te.compute((x.shape[0], x.shape[1], d), lambda t, h, i: x[t, h, i], "unpad_heads")
