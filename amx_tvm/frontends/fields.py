"""The fields of a model's configuration that anybody here reads: their types and their bounds.

A configuration is written by others. Its numbers are checked before anything is built of them: no
released model comes near the bounds, and beyond them a tensor's size no longer fits a machine.
"""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from amx_tvm.errors import ModelError
from amx_tvm.schema import Count, Mismatch, Range, conform

Width = Annotated[int, Range(1, 1 << 20)]
Layers = Annotated[int, Range(1, 4096)]
Heads = Annotated[int, Range(1, 4096)]
HeadSize = Annotated[int, Range(1, 4096)]
Vocabulary = Annotated[int, Range(1, 1 << 24)]
Epsilon = Annotated[float, Range(0, 1)]
Base = Annotated[float, Range(1.001, 1e15)]
Positive = Annotated[float, Range(1e-9, 1e9)]
Share = Annotated[float, Range(1e-3, 1)]
Cap = Annotated[float, Range(0, 1e9)]
# Old configurations write -1 for a token that the model lacks.
Token = Annotated[int, Range(-1, 2**32 - 1)]
Window = Annotated[int, Range(0, 2**32 - 1)]


class Scaling(TypedDict, total=False):
    """``rope_scaling``."""

    rope_type: str
    type: str
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Count
    beta_fast: Positive
    beta_slow: Positive
    attention_factor: Positive
    mscale: Cap
    mscale_all_dim: Cap
    truncate: bool
    llama_4_scaling_beta: Cap
    short_factor: list[Positive]
    long_factor: list[Positive]
    partial_rotary_factor: Share
    rope_theta: Base


class LayerFields(TypedDict, total=False):
    """What ``per_layer_config`` says of one layer."""

    head_dim: HeadSize
    num_key_value_heads: Heads


class VisionFields(TypedDict, total=False):
    """``vision_config``."""

    model_type: str
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_channels: Annotated[int, Range(3, 3)]
    image_size: Annotated[int, Range(1, 1 << 14)]
    patch_size: Annotated[int, Range(1, 1 << 10)]
    hidden_act: str
    layer_norm_eps: Epsilon


class ImageFields(TypedDict, total=False):
    """What prepares images: ``preprocessor_config.json``."""

    do_resize: bool
    do_rescale: bool
    do_normalize: bool
    do_convert_rgb: bool
    do_image_splitting: bool
    do_center_crop: bool
    do_pad: bool
    resample: Annotated[int, Range(0, 5)]
    rescale_factor: Positive
    image_mean: list[float]
    image_std: list[float]
    size: dict[str, Annotated[int, Range(1, 1 << 14)]]
    max_image_size: dict[str, Annotated[int, Range(1, 1 << 14)]]
    crop_size: dict[str, Annotated[int, Range(1, 1 << 14)]]


class Configuration(TypedDict, total=False):
    """``config.json``; every field may be missing or null as well."""

    architectures: list[str]
    model_type: str
    vocab_size: Vocabulary
    hidden_size: Width
    n_embd: Width
    intermediate_size: Width
    n_inner: Width
    moe_intermediate_size: Width
    num_hidden_layers: Layers
    n_layer: Layers
    num_attention_heads: Heads
    n_head: Heads
    num_key_value_heads: Heads
    head_dim: HeadSize
    global_head_dim: HeadSize
    num_global_key_value_heads: Heads
    per_layer_config: dict[str, LayerFields]
    num_kv_shared_layers: Annotated[int, Range(0, 4096)]
    attention_k_eq_v: bool
    use_double_wide_mlp: bool
    enable_moe_block: bool
    hidden_size_per_layer_input: Annotated[int, Range(0, 1 << 16)]
    vocab_size_per_layer_input: Vocabulary
    query_pre_attn_scalar: Positive
    max_position_embeddings: Count
    n_positions: Count
    n_ctx: Count
    original_max_position_embeddings: Count
    rms_norm_eps: Epsilon
    layer_norm_eps: Epsilon
    layer_norm_epsilon: Epsilon
    rope_theta: Base
    rope_local_base_freq: Base
    rope_scaling: Scaling
    rope_parameters: dict[str, Any]
    partial_rotary_factor: Share
    attention_multiplier: Positive
    embedding_multiplier: Positive
    residual_multiplier: Positive
    logits_scaling: Positive
    logit_scale: Positive
    attn_logit_softcapping: Cap
    final_logit_softcapping: Cap
    hidden_act: str
    hidden_activation: str
    activation_function: str
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    use_bias: bool
    use_qkv_bias: bool
    use_parallel_residual: bool
    qk_layernorm: bool
    use_qk_norm: bool
    clip_qkv: Positive
    tie_word_embeddings: bool
    use_sliding_window: bool
    use_bidirectional_attention: bool | str
    scale_attn_by_inverse_layer_idx: bool
    reorder_and_upcast_attn: bool
    scale_attn_weights: bool
    add_cross_attention: bool
    norm_topk_prob: bool
    sliding_window: Window
    sliding_window_pattern: Layers | str
    max_window_layers: Annotated[int, Range(0, 1 << 20)]
    layer_types: list[str]
    no_rope_layers: list[int]
    no_rope_layer_interval: Layers
    num_experts: Annotated[int, Range(0, 1 << 16)]
    num_local_experts: Annotated[int, Range(0, 1 << 16)]
    num_experts_per_tok: Annotated[int, Range(0, 1 << 16)]
    top_k_experts: Annotated[int, Range(0, 1 << 16)]
    decoder_sparse_step: Layers
    mlp_only_layers: list[int]
    n_routed_experts: Annotated[int, Range(0, 1 << 16)]
    n_shared_experts: Annotated[int, Range(0, 1 << 10)]
    n_group: Annotated[int, Range(1, 1 << 16)]
    topk_group: Annotated[int, Range(1, 1 << 16)]
    topk_method: str
    scoring_func: str
    routed_scaling_factor: Positive
    first_k_dense_replace: Annotated[int, Range(0, 4096)]
    moe_layer_freq: Annotated[int, Range(0, 4096)]
    mlp_layer_types: list[str]
    shared_intermediate_size: Width
    q_lora_rank: Annotated[int, Range(0, 1 << 20)]
    kv_lora_rank: Width
    qk_nope_head_dim: HeadSize
    qk_rope_head_dim: HeadSize
    v_head_dim: HeadSize
    rope_interleave: bool
    position_embedding_type: str
    swiglu_limit: Cap
    swiglu_alpha: Cap
    bos_token_id: Token
    eos_token_id: Token | list[Token]
    pad_token_id: Token
    tokenizer_class: str
    text_config: dict[str, Any]
    vision_config: VisionFields
    image_processor: ImageFields
    image_token_id: Token
    image_token_index: Token
    scale_factor: Annotated[int, Range(1, 64)]
    vision_feature_layer: int | list[int]
    vision_feature_select_strategy: str
    projector_hidden_act: str
    multimodal_projector_bias: bool


def check_fields(values: dict[str, Any], source: object) -> dict[str, Any]:
    """Return a configuration whose known fields have the types and bounds of `Configuration`.

    Parameters
    ----------
    values : dict
        The configuration, of any keys.
    source : object
        Where it comes from, for messages.

    Raises
    ------
    ModelError
        With the first field that is out of sense, and what was expected.
    """
    try:
        return {**values, **conform(Configuration, without_nulls(values))}
    except Mismatch as problem:
        raise ModelError(f"{source}: the configuration field {problem}") from None


def without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Return an object without its null fields, and without those of objects in it."""
    return {
        key: without_nulls(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }
