"""Seed-OSS: Llama's block with biases on q, k and v, and a flag of its own for o's."""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM
from amx_tvm.models.registry import ModelFamily, register


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Seed-OSS configuration."""
    read = ConfigReader(values)
    return read_decoder(
        {"head_dim": 128, **values},
        "seed_oss",
        qkv_bias=bool(read.get("attention_bias", True)),
        o_bias=bool(read.get("attention_out_bias", False)),
    )


register(
    ModelFamily(
        name="seed_oss",
        architectures=("SeedOssForCausalLM",),
        model_types=("seed_oss",),
        configure=configure,
        build=CausalLM,
    )
)
