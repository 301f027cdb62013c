"""Gemma 1 to 3: scaled embeddings, norms around both blocks, local and global layers, soft caps.

Differences from Llama's block:

* RMSNorm multiplies by 1 + w: the 1 is added to the weights when they are loaded;
* four norms a layer, before and after attention and MLP; a gate of GELU (tanh);
* embeddings are multiplied by sqrt(hidden_size), and the head is tied to them;
* q k^T is scaled by query_pre_attn_scalar ** -0.5;
* most layers see only a window, and in Gemma 3 rotate with a base of their own;
* Gemma 1 has Llama's two norms a layer, and no layer that slides;
* Gemma 2 bounds scores and logits by c tanh(s / c); Gemma 3 normalizes queries and keys instead;
* EmbeddingGemma is a Gemma 3 whose tokens see both ways.

The residual stream of trained models passes 65504, the most that float16 holds: 104 000 in Gemma 3
270M, at the first token, and more in larger ones. From Gemma 2 on it is a 64th of the checkpoint's.
"""

from __future__ import annotations

from typing import Any

from amx_tvm.models.config import SLIDING, DecoderConfig, Rope
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import CausalLM, DecoderModel
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.weights import Weight

STREAM = 2.0**-6


def _configure(
    values: dict[str, Any], family: str, period: int, causal: bool = True, **differences
) -> DecoderConfig:
    """Read what both have in common; every ``period``-th layer is global by default."""
    read = ConfigReader(values)
    hidden = read.require("hidden_size")
    read.only("use_bidirectional_attention", {not causal: None}, False)
    head_dim = read.get("head_dim", 256)
    values = {
        **values,
        "layer_types": read.sliding_pattern(period),
        "tie_word_embeddings": read.get("tie_word_embeddings", True),
        "head_dim": head_dim,
    }
    return read_decoder(
        values,
        family,
        norm_placement="sandwich",
        activation=read.activation("hidden_activation", "gelu_pytorch_tanh"),
        attention_factor=float(read.get("query_pre_attn_scalar", head_dim)) ** -0.5,
        attention_soft_cap=float(read.get("attn_logit_softcapping", 0.0)),
        logit_soft_cap=float(read.get("final_logit_softcapping", 0.0)),
        embedding_scale=hidden**0.5 * STREAM,
        stream_scale=STREAM,
        causal=causal,
        **differences,
    )


def configure_gemma(values: dict[str, Any]) -> DecoderConfig:
    """Read a Gemma 1 configuration."""
    read = ConfigReader(values)
    # Old files write "gelu" and mean its approximation, as llama.cpp and Google's own code have it.
    name = "hidden_act" if read.get("hidden_activation", None) is None else "hidden_activation"
    read.activation(name, "gelu_pytorch_tanh")
    values = {"head_dim": 256, **values, "layer_types": None}
    values["tie_word_embeddings"] = read.get("tie_word_embeddings", True)
    return read_decoder(
        values,
        "gemma",
        activation="gelu_tanh",
        embedding_scale=read.require("hidden_size") ** 0.5,
    )


def configure_gemma2(values: dict[str, Any]) -> DecoderConfig:
    """Read a Gemma 2 configuration: every second layer is global."""
    return _configure(values, "gemma2", 2)


def configure_gemma3(values: dict[str, Any], **differences: Any) -> DecoderConfig:
    """Read a Gemma 3 text configuration: every sixth layer is global, with a longer RoPE."""
    read = ConfigReader(values)
    theta, scaling = ConfigReader({"rope_theta": 1e6, **values}).rope()
    far = Rope(theta, scaling)
    near = Rope(float(read.get("rope_local_base_freq", 10000.0)))
    return _configure(
        values,
        "gemma3",
        6,
        qk_norm="head",
        layer_ropes=tuple(near if kind == SLIDING else far for kind in read.sliding_pattern(6)),
        **differences,
    )


def configure_embedding(values: dict[str, Any]) -> DecoderConfig:
    """Read EmbeddingGemma's: tokens see both ways, half of ``sliding_window`` to each side."""
    window = ConfigReader(values).get("sliding_window", 4096)
    return configure_gemma3({**values, "sliding_window": window // 2 + 1}, causal=False)


_BEHIND = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


def weight(name: str, config: DecoderConfig) -> Weight:
    """Find a weight in the checkpoint; norms get 1, those behind blocks the scale."""
    added = name.endswith(_BEHIND) and config.norm_placement == "sandwich"
    factor = config.stream_scale if added else 1.0
    return Weight(name, offset=1.0 if name.endswith("norm.weight") else 0.0, factor=factor)


register(
    ModelFamily(
        name="gemma",
        architectures=("GemmaForCausalLM",),
        model_types=("gemma",),
        configure=configure_gemma,
        build=CausalLM,
        weight=weight,
    )
)
register(
    ModelFamily(
        name="gemma2",
        architectures=("Gemma2ForCausalLM",),
        model_types=("gemma2",),
        configure=configure_gemma2,
        build=CausalLM,
        weight=weight,
    )
)
register(
    ModelFamily(
        name="gemma3",
        architectures=("Gemma3ForCausalLM",),
        model_types=("gemma3_text",),
        configure=configure_gemma3,
        build=CausalLM,
        weight=weight,
    )
)
register(
    ModelFamily(
        name="embedding-gemma",
        architectures=("Gemma3TextModel",),
        model_types=("gemma3_text",),
        configure=configure_embedding,
        build=DecoderModel,
        weight=weight,
        kind="embedding",
    )
)
