"""BERT, RoBERTa and XLM-R: learned positions, LayerNorm behind each block, biases everywhere.

A text is one segment, so of the table of segments the first row is added to every token. RoBERTa
counts positions from the padding's id + 1: its table begins there.
"""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.config_reader import ConfigReader
from amx_tvm.models.decoder import ACTIVATIONS, Attention
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.step import Step
from amx_tvm.models.weights import Names, Weight

_PARTS = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.o_proj": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_TABLES = {
    "embed_tokens": "word_embeddings",
    "embed_positions": "position_embeddings",
    "embed_norm": "LayerNorm",
}


class BertMLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config: DecoderConfig) -> None:
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden] to [tokens, hidden]."""
        return self.down_proj(self.activation(self.up_proj(x)))


class BertLayer(nn.Module):
    """Attention and MLP, each added to what it reads and normed then."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        self.self_attn = Attention(config, layer)
        self.attn_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = BertMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map [tokens, hidden] to [tokens, hidden]."""
        x = self.attn_norm(self.self_attn(x, step) + x)
        return self.mlp_norm(self.mlp(x) + x)


class BertModel(nn.Module):
    """Embeddings and layers."""

    def __init__(self, config: DecoderConfig) -> None:
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.embed_positions = nn.Embedding(config.context_length, hidden)
        self.segment = nn.Parameter((1, hidden))
        self.embed_norm = nn.LayerNorm(hidden, config.norm_eps)
        self.layers = nn.ModuleList([BertLayer(config, i) for i in range(config.num_layers)])

    def norm(self, hidden: Tensor) -> Tensor:
        """Return the last hidden states as they are: every layer ends with a norm."""
        return hidden

    def run(self, input_ids: Tensor, step: Step) -> Tensor:
        """Map token ids int32 [rows] to hidden states [rows, hidden]."""
        tokens = self.embed_tokens(input_ids) + self.embed_positions(step.positions())
        hidden = self.embed_norm(tokens + self.segment)
        for layer in self.layers:
            hidden = layer(hidden, step)
        return hidden


def _read(values: dict[str, Any], family: str, skipped: int) -> DecoderConfig:
    """Read a configuration whose table of positions has some that no token gets."""
    read = ConfigReader(values)
    hidden, heads = read.require("hidden_size"), read.require("num_attention_heads")
    layers = read.require("num_hidden_layers")
    read.only("position_embedding_type", {"absolute": None}, "absolute")
    read.only("is_decoder", {False: None}, False)
    return DecoderConfig(
        family=family,
        vocab_size=read.require("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.require("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        context_length=read.require("max_position_embeddings") - skipped,
        norm_eps=read.require("layer_norm_eps", float),
        rope_theta=10000.0,
        layer_ropes=(None,) * layers,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        activation=read.activation(default="gelu"),
        causal=False,
    )


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a BERT configuration."""
    return _read(values, "bert", 0)


def configure_roberta(values: dict[str, Any]) -> DecoderConfig:
    """Read a RoBERTa or XLM-R configuration."""
    return _read(values, "roberta", int(ConfigReader(values).get("pad_token_id", 1)) + 1)


def _weight(name: str, prefix: str, skipped: int, context: int) -> Weight:
    tables = f"{prefix}embeddings."
    if name == "model.segment":
        return Weight(f"{tables}token_type_embeddings.weight", rows=(0, 1))
    stored = Names(f"{prefix}encoder.layer.", tables, _PARTS, _TABLES).of(name)
    if skipped and name == "model.embed_positions.weight":
        return Weight(stored, rows=(skipped, skipped + context))
    return Weight(stored)


def weight(name: str, config: DecoderConfig) -> Weight:
    """Find a weight in a BERT checkpoint."""
    return _weight(name, "bert.", 0, config.context_length)


def weight_roberta(name: str, config: DecoderConfig) -> Weight:
    """Find a weight in a RoBERTa checkpoint, of a table that begins at position 2."""
    return _weight(name, "roberta.", 2, config.context_length)


register(
    ModelFamily(
        name="bert",
        architectures=("BertModel", "BertForMaskedLM"),
        model_types=("bert",),
        configure=configure,
        build=BertModel,
        weight=weight,
        prefix="bert.",
        kind="embedding",
    )
)
register(
    ModelFamily(
        name="roberta",
        architectures=("XLMRobertaModel", "RobertaModel", "XLMRobertaForMaskedLM"),
        model_types=("xlm-roberta", "roberta"),
        configure=configure_roberta,
        build=BertModel,
        weight=weight_roberta,
        prefix="roberta.",
        kind="embedding",
    )
)
