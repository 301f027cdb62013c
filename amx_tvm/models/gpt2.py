"""GPT-2: LayerNorm, learned positions, an MLP without gate, biases everywhere.

The checkpoint stores linears as "Conv1D", [in_features, out_features], with q, k and v in one;
here they are q_proj, k_proj, v_proj like everywhere else, read as slices of the transposed weight.
"""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader
from amx_tvm.models.decoder import ACTIVATIONS, Attention, CausalLM, DecoderModel
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.step import Step
from amx_tvm.models.weights import Weight


class GPT2MLP(nn.Module):
    """proj(act(fc(x)))."""

    def __init__(self, config: DecoderConfig) -> None:
        self.activation = ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden] to [tokens, hidden]."""
        return self.c_proj(self.activation(self.c_fc(x)))


class GPT2Layer(nn.Module):
    """Attention and MLP behind LayerNorms."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        self.ln_1 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map the residual stream [tokens, hidden] to the next one."""
        x = self.self_attn(self.ln_1(x), step) + x
        return self.mlp(self.ln_2(x)) + x


class GPT2Model(DecoderModel):
    """Adds the position's embedding to the token's."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.wpe = nn.Embedding(config.context_length, config.hidden_size)

    def make_layer(self, config: DecoderConfig, index: int) -> nn.Module:
        """Build one layer."""
        return GPT2Layer(config, index)

    def make_norm(self, config: DecoderConfig) -> nn.Module:
        """Build the final norm."""
        return nn.LayerNorm(config.hidden_size, config.norm_eps)

    def embed(self, input_ids: Tensor, step: Step) -> Tensor:
        """Return the residual stream's start [tokens, hidden]."""
        return self.embed_tokens(input_ids) + self.wpe(step.positions())


class GPT2(CausalLM):
    """GPT-2 with its tied head."""

    def make_model(self, config: DecoderConfig) -> nn.Module:
        """Build the decoder."""
        return GPT2Model(config)


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a GPT-2 configuration, whose fields have names of their own."""
    read = ConfigReader(values)
    hidden, heads, layers = read.require("n_embd"), read.require("n_head"), read.require("n_layer")
    read.only("scale_attn_by_inverse_layer_idx", {False: False}, False)
    read.only("add_cross_attention", {False: False}, False)
    scaled = read.get("scale_attn_weights", True)
    return DecoderConfig(
        family="gpt2",
        vocab_size=read.require("vocab_size"),
        hidden_size=hidden,
        intermediate_size=int(read.get("n_inner", 4 * hidden)),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        context_length=read.require("n_positions"),
        norm_eps=read.require("layer_norm_epsilon", float),
        rope_theta=10000.0,
        layer_ropes=(None,) * layers,
        tie_embeddings=bool(read.get("tie_word_embeddings", True)),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        activation=read.activation("activation_function", "gelu_new"),
        attention_factor=None if scaled else 1.0,
    )


def weight(name: str, config: DecoderConfig) -> tuple[Weight, ...]:
    """Find a weight: "transformer.h.0.attn...", or in GGUF files the module's own, [out, in]."""
    stem, _, part = name.rpartition(".self_attn.")
    if part.startswith(("q_proj", "k_proj", "v_proj")):
        start = "qkv".index(part[0]) * config.hidden_size
        kind = part.rpartition(".")[2]
        own = Weight(f"{stem}.self_attn.qkv_proj.{kind}", rows=(start, start + config.hidden_size))
    else:
        own = Weight(name)
    return (own,) if name == "lm_head.weight" else (_published(name, config), own)


def _published(name: str, config: DecoderConfig) -> Weight:
    """Find a weight in a Hugging Face checkpoint."""
    name = name.removeprefix("model.").replace("layers.", "h.")
    name = name.replace("embed_tokens", "wte").replace("self_attn", "attn")
    name = "ln_f" + name.removeprefix("norm") if name.startswith("norm.") else name
    stem, _, kind = f"transformer.{name}".rpartition(".")
    parent, _, part = stem.rpartition(".")
    hidden = config.hidden_size
    if part in ("q_proj", "k_proj", "v_proj"):
        start = ("q_proj", "k_proj", "v_proj").index(part) * hidden
        rows = (start, start + hidden)
        return Weight(f"{parent}.c_attn.{kind}", transpose=kind == "weight", rows=rows)
    if part in ("o_proj", "c_proj", "c_fc"):
        stored = "c_proj" if part == "o_proj" else part
        return Weight(f"{parent}.{stored}.{kind}", transpose=kind == "weight")
    return Weight(f"{stem}.{kind}")


register(
    ModelFamily(
        name="gpt2",
        architectures=("GPT2LMHeadModel",),
        model_types=("gpt2",),
        configure=configure,
        build=GPT2,
        weight=weight,
        prefix="transformer.",
        default_special_id=50256,
    )
)
