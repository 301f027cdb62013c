"""DeepSeek-V2 and V3, and GLM-4.7-Flash: latent attention, experts by group, shared experts."""

from __future__ import annotations

import math
from typing import Any

from amx_tvm.errors import ModelError
from amx_tvm.models import qwen3_moe
from amx_tvm.models.config import DecoderConfig, Latent
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.latent import LatentLM
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.routing import read_routing
from amx_tvm.models.weights import Weight

METHODS = {"greedy": 1, "group_limited_greedy": 1}


def _configure(values: dict[str, Any], family: str, experts: dict[str, Any]) -> DecoderConfig:
    read = ConfigReader(values)
    latent = Latent(
        rank=read.require("kv_lora_rank"),
        query_rank=int(read.get("q_lora_rank", 0)),
        still=read.require("qk_nope_head_dim"),
        turned=read.require("qk_rope_head_dim"),
        value=read.require("v_head_dim"),
    )
    if min(latent.rank, latent.still, latent.turned, latent.value) <= 0:
        raise ModelError(
            f"the configuration of this {family} model: kv_lora_rank, qk_nope_head_dim, "
            f"qk_rope_head_dim and v_head_dim are {latent.rank}, {latent.still}, {latent.turned} "
            f"and {latent.value}; expected numbers above 0"
        )
    read.only("moe_layer_freq", {1: 1}, 1)
    _, scaling = read.rope()
    factor, weight = float(scaling.get("factor") or 1.0), scaling.get("mscale_all_dim") or 0.0
    growth = 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    keys = latent.still + latent.turned
    return read_decoder(
        values,
        family,
        num_kv_heads=read.require("num_attention_heads"),
        head_dim=max(keys, latent.value),
        rotary_dim=latent.turned,
        attention_factor=keys**-0.5 * growth**2,
        latent=latent,
        **experts,
    )


def configure_v2(values: dict[str, Any]) -> DecoderConfig:
    """Read a DeepSeek-V2 configuration; shares are never divided by their sum."""
    read = ConfigReader(values)
    best = read.only("topk_method", METHODS, "greedy")
    read.only("scoring_func", {"softmax": 1}, "softmax")
    if read.get("topk_method", "greedy") == "greedy":
        values = {**values, "n_group": 1, "topk_group": 1}
    routing = read_routing(values, "softmax", group_best=best, normed=False)
    return _configure(values, "deepseek_v2", routing)


def configure_v3(values: dict[str, Any]) -> DecoderConfig:
    """Read a DeepSeek-V3 configuration."""
    read = ConfigReader(values)
    read.only("rope_interleave", {True: True}, True)
    read.only("scoring_func", {"sigmoid": 1}, "sigmoid")
    read.only("topk_method", {"noaux_tc": 1}, "noaux_tc")
    return _configure(values, "deepseek_v3", read_routing(values, "sigmoid"))


def configure_glm(values: dict[str, Any]) -> DecoderConfig:
    """Read a GLM-4.7-Flash configuration; all layers but the first have experts by default."""
    ConfigReader(values).only("rope_interleave", {True: True}, True)
    routing = read_routing({"first_k_dense_replace": 1, **values}, "sigmoid")
    return _configure(values, "glm4_moe_lite", routing)


def weight(name: str, config: DecoderConfig) -> tuple[Weight, ...]:
    """Find a weight: rotating channels neighbour each other, and are a head's last."""
    latent = config.latent
    assert latent is not None
    if ".q_b_proj." in name or ".q_proj." in name:
        return (Weight(name, order=_turned_first(latent.still, latent.turned)),)
    if ".kv_a_proj_with_mqa." in name:
        turned = _turned_first(latent.rank, latent.turned)
        order = tuple(range(latent.rank)) + turned[: latent.turned]
        return (Weight(name, order=order),)
    if name.endswith(".mlp.choice_bias"):
        return (Weight(name.replace("choice_bias", "gate.e_score_correction_bias")),)
    return qwen3_moe.weight(name, config)


def _turned_first(still: int, turned: int) -> tuple[int, ...]:
    """Order channels (still, pairs that turn) as (firsts of pairs, seconds, still)."""
    pairs = range(still, still + turned)
    return (*pairs[::2], *pairs[1::2], *range(still))


for _name, _class, _read in (
    ("deepseek_v2", "DeepseekV2ForCausalLM", configure_v2),
    ("deepseek_v3", "DeepseekV3ForCausalLM", configure_v3),
    ("glm4_moe_lite", "Glm4MoeLiteForCausalLM", configure_glm),
):
    register(
        ModelFamily(
            name=_name,
            architectures=(_class,),
            model_types=(_name,),
            configure=_read,
            build=LatentLM,
            weight=weight,
        )
    )
