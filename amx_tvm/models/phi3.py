"""Phi-3 and Phi-4-mini: Llama's block; q, k, v and gate, up are one weight each in the checkpoint.

The decoder keeps them apart, as everywhere else, and reads slices of rows; the compiler's passes
merge them again.
"""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import SLIDING, DecoderConfig
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.weights import Weight


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Phi-3 configuration; longrope finds the trained length beside its factors."""
    read = ConfigReader(values)
    scaling = values.get("rope_scaling")
    if scaling and (scaling.get("rope_type") or scaling.get("type")) in ("longrope", "su", "yarn"):
        kind = scaling.get("rope_type") or scaling["type"]
        scaling = {**scaling, "rope_type": "longrope" if kind == "su" else kind}
        if not scaling.get("original_max_position_embeddings"):
            trained = read.require("original_max_position_embeddings")
            scaling["original_max_position_embeddings"] = trained
    window = int(read.get("sliding_window", 0))
    kinds = [SLIDING] * read.require("num_hidden_layers") if window else None
    return read_decoder({**values, "rope_scaling": scaling, "layer_types": kinds}, "phi3")


def weight(name: str, config: DecoderConfig) -> tuple[Weight, ...]:
    """Find a weight: rows of qkv_proj or gate_up_proj; some GGUF files hold them apart."""
    d, inner = config.head_dim, config.intermediate_size
    heads, kv = config.num_heads * d, config.num_kv_heads * d
    slices = {
        "q_proj": ("qkv_proj", 0, heads),
        "k_proj": ("qkv_proj", heads, heads + kv),
        "v_proj": ("qkv_proj", heads + kv, heads + 2 * kv),
        "gate_proj": ("gate_up_proj", 0, inner),
        "up_proj": ("gate_up_proj", inner, 2 * inner),
    }
    stem, _, kind = name.rpartition(".")
    parent, _, part = stem.rpartition(".")
    if part not in slices:
        return (Weight(name),)
    fused, start, stop = slices[part]
    return Weight(f"{parent}.{fused}.{kind}", rows=(start, stop)), Weight(name)


register(
    ModelFamily(
        name="phi3",
        architectures=("Phi3ForCausalLM",),
        model_types=("phi3",),
        configure=configure,
        build=CausalLM,
        weight=weight,
    )
)
