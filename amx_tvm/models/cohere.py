"""Command R and R7B (Cohere 1 and 2): attention and MLP side by side behind one LayerNorm.

Neighbouring channels rotate together; logits have a factor and the head is tied. In Cohere 2, three
of four layers slide, and the full ones have no positions.
"""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import SLIDING, DecoderConfig, Rope
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.weights import paired


def _configure(values: dict[str, Any], family: str, **differences: Any) -> DecoderConfig:
    read = ConfigReader(values)
    read.only("use_qk_norm", {False: False}, False)
    return read_decoder(
        {**values, "tie_word_embeddings": read.get("tie_word_embeddings", True)},
        family,
        norm="layer_weight",
        norm_eps=float(read.get("layer_norm_eps", 1e-5)),
        norm_placement="parallel",
        logit_scale=float(read.get("logit_scale", 0.0625)),
        **differences,
    )


def configure_cohere(values: dict[str, Any]) -> DecoderConfig:
    """Read a Cohere configuration."""
    return _configure(values, "cohere")


def configure_cohere2(values: dict[str, Any]) -> DecoderConfig:
    """Read a Cohere 2 configuration."""
    read = ConfigReader(values)
    kinds, rope = read.sliding_pattern(4), Rope(*read.rope())
    return _configure(
        {**values, "layer_types": kinds},
        "cohere2",
        layer_ropes=tuple(rope if kind == SLIDING else None for kind in kinds),
    )


register(
    ModelFamily(
        name="cohere",
        architectures=("CohereForCausalLM",),
        model_types=("cohere",),
        configure=configure_cohere,
        build=CausalLM,
        weight=paired,
    )
)
register(
    ModelFamily(
        name="cohere2",
        architectures=("Cohere2ForCausalLM",),
        model_types=("cohere2",),
        configure=configure_cohere2,
        build=CausalLM,
        weight=paired,
    )
)
