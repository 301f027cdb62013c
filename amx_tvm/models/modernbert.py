"""ModernBERT: rotary positions, norms without bias in front of the blocks, local layers, GeGLU.

q, k and v are one weight in the checkpoint, gate and up another, whose first half is activated.
Every third layer sees all tokens and turns by a base of its own; the others see half of
``local_attention`` to each side. The first layer's attention reads the normed embeddings as they
are.
"""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from amx_tvm.models.config import FULL, SLIDING, DecoderConfig, Rope
from amx_tvm.models.config_reader import ConfigReader
from amx_tvm.models.decoder import ACTIVATIONS, block_norm
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.step import Step, attention_spec
from amx_tvm.models.weights import Names, Weight

_PARTS = {
    "self_attn.qkv_proj": "attn.Wqkv",
    "self_attn.o_proj": "attn.Wo",
    "mlp.gate_up_proj": "mlp.Wi",
    "mlp.down_proj": "mlp.Wo",
}
_TABLES = {
    "embed_tokens": "embeddings.tok_embeddings",
    "embed_norm": "embeddings.norm",
    "final_norm": "final_norm",
}


class ModernBertAttention(nn.Module):
    """Attention whose queries, keys and values are one product."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        self.config, self.spec = config, attention_spec(config, layer)
        hidden, channels = config.hidden_size, config.num_heads * config.head_dim
        self.qkv_proj = nn.Linear(hidden, 3 * channels, bias=config.qkv_bias)
        self.o_proj = nn.Linear(channels, hidden, bias=config.o_bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Attend: x [tokens, hidden] -> [tokens, hidden]."""
        rows, config = x.shape[0], self.config
        qkv = op.reshape(self.qkv_proj(x), (rows, 3 * config.num_heads, config.head_dim))
        return self.o_proj(op.reshape(step.attend(self.spec, qkv), (rows, -1)))


class ModernBertMLP(nn.Module):
    """down(act(gate) * up)."""

    def __init__(self, config: DecoderConfig) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden] to [tokens, hidden]."""
        gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(self.activation(gate) * up)


class ModernBertLayer(nn.Module):
    """Attention and MLP with norms in front."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        self.attn_norm = block_norm(config) if layer else None
        self.self_attn = ModernBertAttention(config, layer)
        self.mlp_norm = block_norm(config)
        self.mlp = ModernBertMLP(config)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map the residual stream [tokens, hidden] to the next one."""
        normed = x if self.attn_norm is None else self.attn_norm(x)
        x = self.self_attn(normed, step) + x
        return self.mlp(self.mlp_norm(x)) + x


class ModernBertModel(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = block_norm(config)
        self.layers = nn.ModuleList([ModernBertLayer(config, i) for i in range(config.num_layers)])
        self.final_norm = block_norm(config)

    def norm(self, hidden: Tensor) -> Tensor:
        """Norm the last hidden states."""
        return self.final_norm(hidden)

    def run(self, input_ids: Tensor, step: Step) -> Tensor:
        """Map token ids int32 [rows] to hidden states [rows, hidden]."""
        hidden = self.embed_norm(self.embed_tokens(input_ids))
        for layer in self.layers:
            hidden = layer(hidden, step)
        return hidden


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a ModernBERT configuration."""
    read = ConfigReader(values)
    hidden, heads = read.require("hidden_size"), read.require("num_attention_heads")
    layers, bias = read.require("num_hidden_layers"), bool(read.get("attention_bias", False))
    every = read.get("global_attn_every_n_layers", 3)
    kinds = read.get("layer_types", [FULL if i % every == 0 else SLIDING for i in range(layers)])
    kinds = ConfigReader({**values, "layer_types": kinds}).layer_kinds(layers)
    far = Rope(float(read.get("rope_theta", read.get("global_rope_theta", 160000.0))))
    near = read.get("rope_local_base_freq", read.get("local_rope_theta", 10000.0))
    return DecoderConfig(
        family="modernbert",
        vocab_size=read.require("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.require("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        context_length=read.require("max_position_embeddings"),
        norm_eps=float(read.get("norm_eps", 1e-5)),
        norm="layer" if read.get("norm_bias", False) else "layer_weight",
        rope_theta=far.theta,
        layer_kinds=kinds,
        layer_ropes=tuple(Rope(float(near)) if kind == SLIDING else far for kind in kinds),
        sliding_window=read.get("local_attention", 128) // 2 + 1,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(read.get("mlp_bias", False)),
        activation=read.activation("hidden_activation", "gelu"),
        causal=False,
    )


def weight(name: str, _config: DecoderConfig) -> Weight:
    """Find a weight in the checkpoint."""
    return Weight(Names("model.layers.", "model.", _PARTS, _TABLES).of(name))


register(
    ModelFamily(
        name="modernbert",
        architectures=("ModernBertModel", "ModernBertForMaskedLM"),
        model_types=("modernbert",),
        configure=configure,
        build=ModernBertModel,
        weight=weight,
        kind="embedding",
    )
)
