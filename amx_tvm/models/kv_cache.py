"""The paged KV cache that models attend through, for the target that is being compiled for.

CPU and CUDA targets get this project's kernels; CUDA models with heads of other sizes than these
kernels take get TVM's own.
"""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache
from tvm.target import Target

from amx_tvm.errors import ModelError
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.rope import rotation
from relax_passes.attention_spec import Rotation
from relax_passes.kernels.cpu.attention import CpuPagedKVCache, KVCacheConfig
from relax_passes.kernels.cuda.attention.cache import create
from relax_passes.kernels.cuda.attention.config import AttentionConfig

__all__ = ["PagedKVCache", "cache_config", "create_kv_cache", "cuda_attention"]


def head_channels(config: DecoderConfig) -> int:
    """Channels of a head in the cache: CPU kernels take multiples of 16, the rest are zeros."""
    target = Target.current(allow_none=True)
    on_cpu = target is None or target.kind.name == "llvm"
    return -(-config.head_dim // 16) * 16 if on_cpu else config.head_dim


def model_rotates(config: DecoderConfig) -> bool:
    """Whether queries and keys are rotated before they enter the cache, not by its kernels."""
    return bool(config.layer_ropes or config.long_after)


def cache_config(config: DecoderConfig) -> KVCacheConfig:
    """Return the cache's shape, rotary embedding and storage for a model."""
    return KVCacheConfig(
        layers=config.num_layers,
        num_heads=config.num_heads + (config.num_kv_heads if config.attention_sinks else 0),
        num_kv_heads=config.num_kv_heads,
        head_dim=head_channels(config),
        lse_heads=config.attention_sinks,
        rotation=Rotation() if model_rotates(config) else rotation(config, 0),
        sliding_window=config.sliding_window or None,
        attn_kind=tuple(
            "mha_sliding" if config.slides(layer) else "mha" for layer in range(config.num_layers)
        ),
        soft_cap=config.attention_soft_cap,
        quantize=config.attention_format,
        dtype=config.cache_dtype or "float32",
    )


def cuda_attention(config: DecoderConfig) -> AttentionConfig | None:
    """Return what this project's CUDA attention is made for; None where it does not apply."""
    target = Target.current(allow_none=True)
    if target is None or target.kind.name != "cuda" or config.attention_sinks:
        return None
    made = AttentionConfig(
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        str(target.attrs["arch"]),
        config.attention_soft_cap,
    )
    return made if made.fits else None


def check_gpu(config: DecoderConfig, kind: str) -> None:
    """Refuse what TVM's own attention kernels cannot do.

    Raises
    ------
    ModelError
        Naming the feature.
    """
    lacking = []
    if config.sliding_window:
        lacking.append(f"sliding layers (sliding_window {config.sliding_window})")
    if config.attention_sinks:
        lacking.append("attention sinks")
    if config.attention_soft_cap:
        lacking.append(f"attn_logit_softcapping {config.attention_soft_cap}")
    if lacking:
        raise ModelError(
            f"{config.family} models need {' and '.join(lacking)}, which the attention kernels of "
            f"the target {kind!r} do not have; compile for a CPU"
        )


def create_kv_cache(
    config: DecoderConfig,
    max_batch_size: Any,
    max_total_seq_len: Any,
    prefill_chunk_size: Any,
    page_size: Any,
    support_sliding_window: Any,
) -> tuple:
    """Create the cache of a model under the current target, and its state where kernels need it."""
    target = Target.current(allow_none=False)
    if target.kind.name == "llvm":
        shape = cache_config(config)
        return (
            CpuPagedKVCache(shape, max_batch_size, max_total_seq_len, prefill_chunk_size, target),
        )
    attention = cuda_attention(config)
    if attention is not None:
        return create(attention, max_batch_size, max_total_seq_len, prefill_chunk_size)
    check_gpu(config, target.kind.name)
    made = TIRPagedKVCache(
        attn_kind="mha",
        max_batch_size=max_batch_size,
        max_total_seq_len=max_total_seq_len,
        prefill_chunk_size=prefill_chunk_size,
        page_size=page_size,
        support_sliding_window=support_sliding_window,
        layer_partition=relax.ShapeExpr([0, config.num_layers]),
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        qk_head_dim=config.head_dim,
        v_head_dim=config.head_dim,
        mla_original_qk_head_dim=0,
        mla_original_v_head_dim=0,
        rope_mode=RopeMode.NONE if model_rotates(config) else RopeMode.NORMAL,
        rope_scale=1,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
        rope_ext_factors=relax.prim_value(0),
        rotary_dim=config.rotary_dim or config.head_dim,
        enable_disaggregation=False,
        dtype="float16",
        target=target,
    )
    return (made,)
