"""StableLM: LayerNorms with biases; a quarter of a head rotates; attention and MLP may add up."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a StableLM configuration."""
    read = ConfigReader(values)
    read.only("qk_layernorm", {False: False}, False)
    parallel = read.get("use_parallel_residual", False)
    return read_decoder(
        {"partial_rotary_factor": 0.25, **values},
        "stablelm",
        norm="layer",
        norm_eps=float(read.get("layer_norm_eps", 1e-5)),
        norm_placement="parallel" if parallel else "pre",
        qkv_bias=bool(read.get("use_qkv_bias", False)),
    )


register(
    ModelFamily(
        name="stablelm",
        architectures=("StableLmForCausalLM",),
        model_types=("stablelm",),
        configure=configure,
        build=CausalLM,
    )
)
