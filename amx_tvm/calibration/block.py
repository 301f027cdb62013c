"""One decoder layer in torch, cut at the inputs of its linears so that a caller can step in.

`stages` is a generator: it stops at each of the four inputs that linears share, hands the input out
and goes on only when asked to. Weights are read after the stop, so a caller that quantizes the
linears of a stage during the stop computes the next stage with the quantized weights, and nothing
is ever computed twice:

    attention_input -> q_proj, k_proj, v_proj      mlp_input  -> gate_proj, up_proj
    attention_output -> o_proj                     mlp_hidden -> down_proj

It covers the families that share the block of `amx_tvm.models.decoder`: Llama 2 and 3, SmolLM2,
Mistral, Qwen2 and Qwen3. Calibration alone uses torch; engines never see this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amx_tvm.errors import CalibrationError
from amx_tvm.models import DecoderConfig, find

STAGES: dict[str, tuple[str, ...]] = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_hidden": ("mlp.down_proj",),
}
LINEARS = tuple(linear for linears in STAGES.values() for linear in linears)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

Fake = Callable[[Tensor], Tensor]
Stage = tuple[str, Tensor]


def layer_name(layer: int, part: str) -> str:
    """Full Hugging Face name of a parameter of a layer, such as ``mlp.up_proj.weight``."""
    return f"model.layers.{layer}.{part}"


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """Decoder configuration of a model that calibration can compute.

    Raises
    ------
    CalibrationError
        For a family with a block of its own; ModelError for an unknown architecture.
    """
    config = find(dict(values)).configure(dict(values))
    if config.family not in FAMILIES:
        raise CalibrationError(
            f"calibration computes the decoder block of {', '.join(FAMILIES)}; this model is "
            f"{config.family!r}: compile it without a recipe"
        )
    if config.rope_scaling and config.rope_scaling["rope_type"] not in ("llama3", "linear"):
        raise CalibrationError(
            f"calibration computes plain, linear and llama3 RoPE; this model has "
            f"{config.rope_scaling['rope_type']!r}: compile it without a recipe"
        )
    return config


class Rope:
    """Cosines and sines [tokens, head_dim] of rotary positions, in the rotate-half layout."""

    def __init__(self, config: DecoderConfig, tokens: int) -> None:
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        frequency = config.rope_theta ** (-half / config.head_dim)
        frequency = _scaled(frequency, config.rope_scaling)
        angle = torch.outer(torch.arange(tokens, dtype=torch.float32), frequency)
        angle = torch.cat([angle, angle], dim=-1)
        self.cos, self.sin = angle.cos(), angle.sin()

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate [..., tokens, head_dim]."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin


def _scaled(frequency: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Apply linear or Llama 3 scaling to RoPE frequencies [head_dim / 2]."""
    if not scaling:
        return frequency
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return frequency / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)  # 1: keep, 0: divide by the factor
    return frequency * (blend + (1 - blend) / factor)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis in float32."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply float32 [..., K] by a weight [N, K]^T and add the bias [N]."""
    return functional.linear(x, weight, bias)


def stages(
    x: Tensor, weights: Mapping[str, Tensor], config: DecoderConfig, rope: Rope, fake: Fake
) -> Generator[Stage, None, Tensor]:
    """Run one layer over the residual stream.

    Parameters
    ----------
    x : float32 [batch, tokens, hidden]
    weights : the layer's parameters by their name within the layer, read when they are needed
    config : the decoder's shape
    rope : rotary table of at least this many tokens
    fake : applied to every input of a linear: the identity, or fake quantization

    Yields
    ------
    (stage, input) with the input float32 [batch, tokens, K] after `fake`.

    Returns
    -------
    The next residual stream, as the generator's return value.
    """
    batch, tokens, _ = x.shape

    def project(value: Tensor, part: str) -> Tensor:
        return linear(value, weights[f"{part}.weight"], weights.get(f"{part}.bias"))

    def heads(value: Tensor, count: int, norm: str) -> Tensor:
        value = value.view(batch, tokens, count, config.head_dim)
        if config.qk_norm and norm:
            value = rms_norm(value, weights[f"self_attn.{norm}.weight"], config.norm_eps)
        return value.transpose(1, 2)

    hidden = fake(rms_norm(x, weights["input_layernorm.weight"], config.norm_eps))
    yield "attention_input", hidden
    q = rope(heads(project(hidden, "self_attn.q_proj"), config.num_heads, "q_norm"))
    k = rope(heads(project(hidden, "self_attn.k_proj"), config.num_kv_heads, "k_norm"))
    v = heads(project(hidden, "self_attn.v_proj"), config.num_kv_heads, "")
    attended = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, scale=config.attention_scale
    )
    attended = fake(attended.transpose(1, 2).reshape(batch, tokens, -1))
    yield "attention_output", attended
    x = x + project(attended, "self_attn.o_proj")
    hidden = fake(rms_norm(x, weights["post_attention_layernorm.weight"], config.norm_eps))
    yield "mlp_input", hidden
    gate = functional.silu(project(hidden, "mlp.gate_proj"))
    hidden = fake(gate * project(hidden, "mlp.up_proj"))
    yield "mlp_hidden", hidden
    return x + project(hidden, "mlp.down_proj")


def run(generator: Generator[Stage, None, Tensor]) -> Tensor:
    """Run a layer to its end without looking at its stages."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value
