"""Granite 3: Llama with factors on embeddings, scores, residual branches and logits.

Granite 4 without state-space layers is the same with gate and up in one weight, with or without
rotary embedding.
"""

from __future__ import annotations

from typing import Any

from amx_tvm.errors import ModelError
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.weights import Weight


def configure(values: dict[str, Any], family: str = "granite", **differences: Any) -> DecoderConfig:
    """Read a Granite configuration; logits are divided by ``logits_scaling``."""
    read = ConfigReader(values)
    return read_decoder(
        values,
        family,
        attention_factor=float(read.get("attention_multiplier", 1.0)),
        embedding_scale=float(read.get("embedding_multiplier", 1.0)),
        residual_scale=float(read.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / float(read.get("logits_scaling", 1.0)),
        **differences,
    )


def configure_4(values: dict[str, Any]) -> DecoderConfig:
    """Read a Granite 4 configuration, of attention and one dense MLP in every layer."""
    read = ConfigReader(values)
    layers = read.require("num_hidden_layers")
    listed = read.get("layer_types", ["mamba"] * layers)
    if len(listed) != layers:
        raise ModelError(
            f"the configuration field 'layer_types' has {len(listed)} entries for {layers} layers"
        )
    if kinds := set(listed) - {"attention", "full_attention"}:
        raise ModelError(
            f"this Granite 4 model has layers of kind {', '.join(sorted(kinds))}; supported are "
            "those with attention in every layer (granite-4.0-350m, -1b, -micro)"
        )
    read.only("num_local_experts", {0: 0}, 0)
    kind = read.only("position_embedding_type", {"rope": "rope", "nope": "nope"}, "nope")
    return configure(
        values,
        "granite4",
        intermediate_size=read.require("shared_intermediate_size"),
        layer_kinds=(),
        layer_ropes=() if kind == "rope" else (None,) * layers,
    )


def weight(name: str, config: DecoderConfig) -> Weight:
    """Find a weight of Granite 4: gate and up are rows of one."""
    inner = config.intermediate_size
    rows = {"gate_proj": (0, inner), "up_proj": (inner, 2 * inner)}
    stem, _, part = name.removesuffix(".weight").rpartition(".mlp.")
    if part in rows:
        return Weight(f"{stem}.shared_mlp.input_linear.weight", rows=rows[part])
    return Weight(f"{stem}.shared_mlp.output_linear.weight" if part == "down_proj" else name)


register(
    ModelFamily(
        name="granite",
        architectures=("GraniteForCausalLM",),
        model_types=("granite",),
        configure=configure,
        build=CausalLM,
    )
)
register(
    ModelFamily(
        name="granite4",
        architectures=("GraniteMoeHybridForCausalLM",),
        model_types=("granitemoehybrid",),
        configure=configure_4,
        build=CausalLM,
        weight=weight,
    )
)
