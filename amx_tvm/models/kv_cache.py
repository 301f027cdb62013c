"""The paged KV cache that models attend through, for the target that is being compiled for.

CPU targets get this project's parallel, vectorized functions; GPU targets TVM's own kernels.
"""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache
from tvm.target import Target
from tvm import relax

from amx_tvm.models.config import DecoderConfig

__all__ = ["PagedKVCache", "create_kv_cache"]


def create_kv_cache(
    config: DecoderConfig,
    max_batch_size: Any,
    max_total_seq_len: Any,
    prefill_chunk_size: Any,
    page_size: Any,
    support_sliding_window: Any,
) -> PagedKVCache:
    """Create the cache of a model under the current target."""
    target = Target.current(allow_none=False)
    return TIRPagedKVCache(
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
        rope_mode=RopeMode.NORMAL,
        rope_scale=1,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
        rope_ext_factors=relax.prim_value(0),
        rotary_dim=config.head_dim,
        enable_disaggregation=False,
        dtype="float32",
        target=target,
    )
