"""SmolLM3: Llama's block; every fourth layer has no positions at all (NoPE)."""

from __future__ import annotations

from typing import Any

from amx_tvm.errors import ModelError
from amx_tvm.models.config import DecoderConfig, Rope
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.qwen2 import window_of
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a SmolLM3 configuration; ``no_rope_layers`` holds 1 for layers that rotate."""
    read = ConfigReader(values)
    layers, interval = read.require("num_hidden_layers"), int(read.get("no_rope_layer_interval", 4))
    rotates = read.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])
    if len(rotates) != layers:
        raise ModelError(
            f"the configuration field 'no_rope_layers' has {len(rotates)} entries for {layers} "
            "layers"
        )
    values = {"rope_theta": 2e6, **values}
    rope = Rope(*ConfigReader(values).rope())
    values = {**window_of(values), "tie_word_embeddings": read.get("tie_word_embeddings", True)}
    return read_decoder(
        values, "smollm3", layer_ropes=tuple(rope if rotate else None for rotate in rotates)
    )


register(
    ModelFamily(
        name="smollm3",
        architectures=("SmolLM3ForCausalLM",),
        model_types=("smollm3",),
        configure=configure,
        build=CausalLM,
    )
)
