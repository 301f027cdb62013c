"""One decoder layer in torch, cut at the inputs of its linears so that a caller can step in.

`stages` is a generator: it stops at each of the four inputs that linears share, hands the input out
and goes on only when asked to. Weights are read after the stop, so a caller that quantizes the
linears of a stage during the stop computes the next stage with the quantized weights, and nothing
is ever computed twice:

    attention_input -> q_proj, k_proj, v_proj      mlp_input  -> gate_proj, up_proj
    attention_output -> o_proj                     mlp_hidden -> down_proj

It computes every model whose layers are the block of `amx_tvm.models.decoder` with a gated MLP, and
norms in front of attention and MLP or on both sides of them: Llama, SmolLM2 and 3, Mistral, Qwen2
and 3, Phi-3, Gemma 1 and 3. Calibration alone uses torch; engines never see this module.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from amx_tvm.calibration.attention import Attend, exact
from amx_tvm.errors import CalibrationError
from amx_tvm.frontends import ModelSource
from amx_tvm.frontends.checkpoint import identify
from amx_tvm.frontends.family_source import FamilySource
from amx_tvm.models import DecoderConfig
from amx_tvm.models.rope import rotation

STAGES: dict[str, tuple[str, ...]] = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_hidden": ("mlp.down_proj",),
}
LINEARS = tuple(linear for linears in STAGES.values() for linear in linears)
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}

Fake = Callable[[str, Tensor], Tensor]
Rotate = Callable[[Tensor], Tensor]
Stage = tuple[str, Tensor]


def layer_name(layer: int, part: str) -> str:
    """Full name of a parameter of a layer, such as ``mlp.up_proj.weight``."""
    return f"model.layers.{layer}.{part}"


def mlp_norm(config: DecoderConfig) -> str:
    """Name of the norm in front of the MLP, which is Llama's second and Gemma's third."""
    pre = config.norm_placement == "pre"
    return "post_attention_layernorm" if pre else "pre_feedforward_layernorm"


def open_decoder(source: ModelSource) -> tuple[FamilySource, DecoderConfig]:
    """Read a model as the block below sees it: weights under the compiler's names, and its shape.

    Raises
    ------
    CalibrationError
        For a model whose layers compute something else; ModelError for an unknown architecture.
    """
    family, config = identify(source)
    differences = {
        "attention is latent": config.latent is not None,
        "layers differ in size": config.layered is not None,
        "norms are not in front of attention and MLP": (
            config.norm_placement not in ("pre", "sandwich")
        ),
        "queries and keys are normalized across heads": config.qk_norm not in ("", "head"),
        "norms are no RMSNorm": config.norm != "rms",
        "residual stream, logits or queries have factors": (
            config.residual_scale != 1.0 or config.logit_scale != 1.0 or bool(config.query_growth)
        ),
        f"activation is {config.activation}": config.activation not in ACTIVATIONS,
        "scores or logits are capped": bool(config.attention_soft_cap or config.logit_soft_cap),
    }
    parts = [f"{part}.{kind}" for part in LINEARS for kind in ("weight", "bias")]
    parts += [f"{part}.weight" for part in NORMS]
    layers = range(config.num_layers)
    names = [EMBEDDING, *(layer_name(n, part) for n in layers for part in parts), FINAL_NORM]
    view = FamilySource(source, family, config, [*names, HEAD])
    held = set(view.names())
    dense = all(layer_name(n, f"{part}.weight") in held for n in layers for part in LINEARS)
    differences["MLP is not a dense gated one"] = not dense
    for difference, found in differences.items():
        if found:
            raise CalibrationError(
                f"this {family.name} model cannot be calibrated: its {difference}; compile it "
                "without a recipe"
            )
    return view, config


class Rope:
    """Rotary positions of one layer over a window, in the rotate-half layout."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        tokens: int,
        device: str | torch.device = "cpu",
    ) -> None:
        if config.slides(layer) and tokens > config.sliding_window:
            raise CalibrationError(
                f"windows of {tokens} tokens are longer than this model's sliding window of "
                f"{config.sliding_window}; choose a recipe with shorter windows"
            )
        turn = rotation(config, layer, tokens)
        self.width = turn.channels
        if not self.width:
            return
        frequency = np.asarray(turn.frequencies, np.float32)
        angle = torch.outer(torch.arange(tokens).float(), torch.from_numpy(frequency))
        angle = torch.cat([angle, angle], dim=-1)
        self.cos = (angle.cos() * turn.factor).to(device)
        self.sin = (angle.sin() * turn.factor).to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate [..., tokens, head_dim]; channels past the rotary ones stay."""
        if not self.width:
            return x
        turned, rest = x[..., : self.width], x[..., self.width :]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * self.cos + torch.cat([-second, first], dim=-1) * self.sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis in float32."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply float32 [..., K] by a weight [N, K]^T and add the bias [N]."""
    return functional.linear(x, weight, bias)


def stages(
    x: Tensor,
    weights: Mapping[str, Tensor],
    config: DecoderConfig,
    rope: Rotate,
    fake: Fake,
    attend: Attend = exact,
) -> Generator[Stage, None, Tensor]:
    """Run one layer over the residual stream.

    Parameters
    ----------
    x : float32 [batch, tokens, hidden]
    weights : the layer's parameters by their name within the layer, read when they are needed
    config : the decoder's shape
    rope : rotates queries and keys, see `Rope`
    fake : applied to every input of a linear with its stage: nothing, or fake quantization
    attend : attention, see `amx_tvm.calibration.attention`

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

    def behind(value: Tensor, norm: str) -> Tensor:
        if config.norm_placement == "pre":
            return value
        return rms_norm(value, weights[f"{norm}.weight"], config.norm_eps)

    hidden = rms_norm(x, weights["input_layernorm.weight"], config.stream_eps)
    hidden = fake("attention_input", hidden)
    yield "attention_input", hidden
    q = rope(heads(project(hidden, "self_attn.q_proj"), config.num_heads, "q_norm"))
    k = rope(heads(project(hidden, "self_attn.k_proj"), config.num_kv_heads, "k_norm"))
    v = heads(project(hidden, "self_attn.v_proj"), config.num_kv_heads, "")
    attended = attend(q, k, v, config.attention_scale)
    attended = fake("attention_output", attended.transpose(1, 2).reshape(batch, tokens, -1))
    yield "attention_output", attended
    attended = project(attended, "self_attn.o_proj")
    x = x + behind(attended, "post_attention_layernorm")
    hidden = rms_norm(x, weights[f"{mlp_norm(config)}.weight"], config.stream_eps)
    hidden = fake("mlp_input", hidden)
    yield "mlp_input", hidden
    gate = ACTIVATIONS[config.activation](project(hidden, "mlp.gate_proj"))
    hidden = fake("mlp_hidden", gate * project(hidden, "mlp.up_proj"))
    yield "mlp_hidden", hidden
    return x + behind(project(hidden, "mlp.down_proj"), "post_feedforward_layernorm")


def run(generator: Generator[Stage, None, Tensor]) -> Tensor:
    """Run a layer to its end without looking at its stages."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value
