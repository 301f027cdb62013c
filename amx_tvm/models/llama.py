"""Llama-type models: Llama 2 and 3, SmolLM2, and what shares their block unchanged."""

from __future__ import annotations

from typing import Any

from amx_tvm.errors import ModelError
from amx_tvm.models.config import ConfigReader, DecoderConfig
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Llama configuration."""
    read = ConfigReader(values)
    hidden, heads = read.require("hidden_size"), read.require("num_attention_heads")
    activation = read.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"hidden_act is {activation!r}; Llama-type models are supported with silu")
    theta, scaling = read.rope()
    return DecoderConfig(
        family="llama",
        vocab_size=read.require("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.require("intermediate_size"),
        num_layers=read.require("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=int(read.get("num_key_value_heads", heads)),
        head_dim=int(read.get("head_dim", hidden // heads)),
        context_length=read.require("max_position_embeddings"),
        norm_eps=read.require("rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(read.get("tie_word_embeddings", False)),
        qkv_bias=bool(read.get("attention_bias", False)),
        o_bias=bool(read.get("attention_bias", False)),
        mlp_bias=bool(read.get("mlp_bias", False)),
    )


register(
    ModelFamily(
        name="llama",
        architectures=("LlamaForCausalLM",),
        model_types=("llama",),
        configure=configure,
        build=CausalLM,
    )
)
