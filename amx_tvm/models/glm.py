"""GLM-4: half of every head rotates, in neighbouring pairs; gate and up are one weight.

The newer one (GLM-4-0414) has norms behind the blocks as well.
"""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.weights import Weight, paired

# The decoder's names of the norms, and the published ones.
NORMS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}


def _configure(values: dict[str, Any], family: str, **differences: Any) -> DecoderConfig:
    biases = bool({"attention_bias": True, **values}["attention_bias"])
    defaults = {"head_dim": 128, "partial_rotary_factor": 0.5}
    return read_decoder(
        {**defaults, **values}, family, qkv_bias=biases, o_bias=False, **differences
    )


def configure_glm(values: dict[str, Any]) -> DecoderConfig:
    """Read a GLM configuration."""
    return _configure(values, "glm")


def configure_glm4(values: dict[str, Any]) -> DecoderConfig:
    """Read a GLM-4-0414 configuration."""
    return _configure(values, "glm4", norm_placement="sandwich")


def weight(name: str, config: DecoderConfig) -> Weight:
    """Find a weight: gate and up are rows of one."""
    inner = config.intermediate_size
    if ".mlp.gate_proj." in name:
        return Weight(name.replace("gate_proj", "gate_up_proj"), rows=(0, inner))
    if ".mlp.up_proj." in name:
        return Weight(name.replace("up_proj", "gate_up_proj"), rows=(inner, 2 * inner))
    stem, _, kind = name.rpartition(".")
    parent, _, part = stem.rpartition(".")
    if config.norm_placement == "sandwich" and part in NORMS:
        return Weight(f"{parent}.{NORMS[part]}.{kind}")
    return paired(name, config)


register(
    ModelFamily(
        name="glm",
        architectures=("GlmForCausalLM",),
        model_types=("glm",),
        configure=configure_glm,
        build=CausalLM,
        weight=weight,
    )
)
register(
    ModelFamily(
        name="glm4",
        architectures=("Glm4ForCausalLM",),
        model_types=("glm4",),
        configure=configure_glm4,
        build=CausalLM,
        weight=weight,
    )
)
