"""Gemma 4 (text): head sizes and key heads by layer, keys and values that layers share.

Differences from Gemma 3's block:

* RMSNorm multiplies by w; a norm without weight divides values by their root mean square;
* full layers have other sizes than sliding ones, and may take their values from the keys'
  projection; a quarter of their channels turns, at frequencies over all of them;
* the last layers have no keys and values: they read those of the last layer of their kind that has;
* scores have no factor; each layer's result is multiplied by a number;
* "E" models add to each layer what a table and a projection say of the token;
* mixtures have experts beside the dense MLP, which read the residual stream through another norm;
  the router reads it through one of its own, and each expert's share has a factor.

The cache has one size for all layers: smaller heads are filled up with zeros, fewer key heads are
repeated. A layer that reads another's keys and values appends them once more, where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from amx_tvm.errors import ModelError
from amx_tvm.models import qwen3_moe
from amx_tvm.models.config import FULL, SLIDING, DecoderConfig, Layered, Rope
from amx_tvm.models.config_reader import ConfigReader, read_decoder
from amx_tvm.models.decoder import (
    ACTIVATIONS,
    CausalLM,
    DecoderLayer,
    DecoderModel,
    GatedMLP,
    rms_norm,
)
from amx_tvm.models.moe import MixtureMLP, best, read_experts
from amx_tvm.models.registry import ModelFamily, register
from amx_tvm.models.rope import frequencies
from amx_tvm.models.step import Step
from amx_tvm.models.weights import Weight
from relax_passes.attention_spec import AttentionSpec, Rotation


def configure(values: dict[str, Any]) -> DecoderConfig:
    """Read a Gemma 4 text configuration."""
    read = ConfigReader(values)
    read.only("use_bidirectional_attention", {False: None, "vision": None}, False)
    count, kinds = read.require("num_hidden_layers"), read.sliding_pattern(6)
    kinds[-1] = FULL
    sizes = [_sizes(read, layer, kind) for layer, kind in enumerate(kinds)]
    shared = int(read.get("num_kv_shared_layers", 0))
    own = kinds[: count - shared]
    if len(kinds) != count or not set(kinds) <= set(own):
        raise ModelError(
            f"the configuration of this gemma4 model: {shared} of {count} layers share keys and "
            f"values, and layer_types has {len(kinds)} entries, of which the others hold "
            f"{' and '.join(sorted(set(own))) or 'none'}; each kind needs a layer of its own"
        )
    sources = [len(own) - 1 - own[::-1].index(kind) for kind in kinds]
    sources[: len(own)] = range(len(own))
    wide = shared and bool(read.get("use_double_wide_mlp", False))
    inner = read.require("intermediate_size")
    layered = Layered(
        sizes=tuple(size for size, _ in sizes),
        kv_heads=tuple(heads for _, heads in sizes),
        sources=tuple(sources),
        inner=tuple(inner * (2 if wide and i >= len(own) else 1) for i in range(count)),
        values_of_keys=tuple(
            bool(read.get("attention_k_eq_v", False)) and kind == FULL for kind in kinds
        ),
        input_size=int(read.get("hidden_size_per_layer_input", 256)),
        input_vocab=int(read.get("vocab_size_per_layer_input", 262144)),
    )
    experts: dict[str, Any] = {}
    if read.get("enable_moe_block", False):
        sizes_of = ("moe_intermediate_size", ("num_experts",), "top_k_experts")
        experts = read_experts(read, *sizes_of)
    far, near = _ropes(read)
    most = max(layered.kv_heads)
    if any(most % heads for heads in layered.kv_heads):
        raise ModelError(
            f"the configuration of this gemma4 model: layers have {sorted(set(layered.kv_heads))} "
            "key heads, of which one count is no multiple of the others"
        )
    return read_decoder(
        {
            **values,
            "layer_types": kinds,
            "tie_word_embeddings": read.get("tie_word_embeddings", True),
            "partial_rotary_factor": None,
            "rope_scaling": None,
        },
        "gemma4",
        head_dim=max(layered.sizes),
        num_kv_heads=most,
        qk_norm="head",
        norm_placement="sandwich",
        activation=read.activation("hidden_activation", "gelu_pytorch_tanh"),
        attention_factor=1.0,
        logit_soft_cap=float(read.get("final_logit_softcapping", 0.0)),
        embedding_scale=read.require("hidden_size") ** 0.5,
        layer_ropes=tuple(near if kind == SLIDING else far for kind in kinds),
        layered=layered,
        **experts,
    )


def _sizes(read: ConfigReader, layer: int, kind: str) -> tuple[int, int]:
    """Return a layer's channels of a head and key heads."""
    size, heads = int(read.get("head_dim", 256)), int(read.get("num_key_value_heads", 4))
    layers = read.get("per_layer_config", None)
    if layers is not None:
        own = ConfigReader(dict(layers.get(str(layer), layers.get(layer)) or {}))
        return int(own.get("head_dim", size)), int(own.get("num_key_value_heads", heads))
    if kind == SLIDING:
        return size, heads
    if read.get("attention_k_eq_v", False):
        heads = int(read.get("num_global_key_value_heads", heads))
    return int(read.get("global_head_dim", 512)), heads


def _ropes(read: ConfigReader) -> tuple[Rope, Rope]:
    """Return the rotary embeddings of full and of sliding layers; the share is in the former."""
    scaling = dict(read.get("rope_scaling", None) or {"rope_type": "proportional"})
    kind = scaling.get("rope_type", "proportional")
    if kind not in ("proportional", "default"):
        raise ModelError(
            f"rope_scaling of type {kind!r} is not supported for gemma4; expected 'proportional'"
        )
    share = float(read.get("partial_rotary_factor", 0.25 if kind == "proportional" else 1.0))
    far = Rope(float(read.get("rope_theta", 1e6)), {"partial_rotary_factor": share})
    return far, Rope(float(read.get("rope_local_base_freq", 1e4)))


def rotation_of(rope: Rope, size: int) -> Rotation:
    """Return what turns heads of a size: the first share of their pairs, the others stand still."""
    found = frequencies(Rope(rope.theta), size).frequencies
    turned = int(float(rope.scaling.get("partial_rotary_factor", 1.0)) * size // 2)
    return Rotation(tuple(f if i < turned else 0.0 for i, f in enumerate(found)))


class LayeredAttention(nn.Module):
    """Attention of a layer's own sizes, on its own keys and values or on an earlier layer's."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        layered = config.layered
        assert layered is not None
        self.config, self.layer, self.source = config, layer, layered.sources[layer]
        self.size, self.kv_heads = layered.sizes[layer], layered.kv_heads[layer]
        heads, hidden, bias = config.num_heads, config.hidden_size, config.qkv_bias
        rope = config.rope(layer)
        assert rope is not None
        self.spec = AttentionSpec(
            self.source,
            heads,
            config.num_kv_heads,
            config.head_dim,
            config.attention_scale,
            window=config.sliding_window if config.slides(layer) else 0,
            rotation=rotation_of(rope, self.size),
        )
        self.q_proj = nn.Linear(hidden, heads * self.size, bias=bias)
        self.q_norm = rms_norm(config, self.size)
        self.o_proj = nn.Linear(heads * self.size, hidden, bias=config.o_bias)
        self.v_proj: nn.Linear | None = None
        if self.source == layer:
            self.k_proj = nn.Linear(hidden, self.kv_heads * self.size, bias=bias)
            self.k_norm = rms_norm(config, self.size)
            if not layered.values_of_keys[layer]:
                self.v_proj = nn.Linear(hidden, self.kv_heads * self.size, bias=bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Attend: x [tokens, hidden] -> [tokens, hidden]."""
        heads, tokens = self.config.num_heads, x.shape[0]
        q = self.q_norm(op.reshape(self.q_proj(x), (tokens, heads, self.size)))
        if self.source == self.layer:
            step.kept[self.layer] = self._keys_and_values(x)
        k, v = step.kept[self.source]
        attended = step.attend(self.spec, op.concat([self._filled(q), k, v], dim=1))
        if self.size < self.config.head_dim:
            attended, _ = op.split(attended, [self.size], axis=-1)
        return self.o_proj(op.reshape(attended, (tokens, heads * self.size)))

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [tokens, kv_heads, head_dim] as the cache has them."""
        shape = (x.shape[0], self.kv_heads, self.size)
        projected = op.reshape(self.k_proj(x), shape)
        values = projected if self.v_proj is None else op.reshape(self.v_proj(x), shape)
        ones = relax.const(np.ones(self.size, values.dtype))
        values = _normed(values, ones, self.config.norm_eps)
        k, v = (self._repeated(self._filled(part)) for part in (self.k_norm(projected), values))
        return k, v

    def _filled(self, x: Tensor) -> Tensor:
        """Fill heads [tokens, heads, size] with zeros up to the size in the cache."""
        missing = self.config.head_dim - self.size
        if not missing:
            return x
        zeros = op.zeros((x.shape[0], x.shape[1], missing), x.dtype)
        return op.concat([x, zeros], dim=-1)

    def _repeated(self, x: Tensor) -> Tensor:
        """Repeat each key head [tokens, kv_heads, head_dim] as often as the cache has room."""
        times, (tokens, heads, size) = self.config.num_kv_heads // self.kv_heads, x.shape
        if times == 1:
            return x
        wide = op.broadcast_to(
            op.reshape(x, (tokens, heads, 1, size)), (tokens, heads, times, size)
        )
        return op.reshape(wide, (tokens, heads * times, size))


def _normed(x: Tensor, weight: relax.Expr, eps: float) -> Tensor:
    """Return the RMSNorm of the last axis."""
    normed = relax.op.nn.rms_norm(x._expr, weight, axes=[-1], epsilon=eps)
    return Tensor(_expr=relax.BlockBuilder.current().emit(normed))


class LayeredExperts(MixtureMLP):
    """Experts that read one norm of the residual stream, and are chosen by another."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter((config.hidden_size,))
        self.per_expert_scale = nn.Parameter((config.experts,), "float32")
        self.pre_feedforward_layernorm_2 = rms_norm(config, config.hidden_size)

    def to(self, dtype: str | None = None) -> None:
        """Keep the type of the shares' factors."""
        for part in (self.router, self.experts, self.pre_feedforward_layernorm_2):
            part.to(dtype)
        self.scale.to(dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map the residual stream to the experts of each token, best first, and their shares."""
        config = self.config
        size = config.hidden_size
        normed = _normed(x, self.scale._expr, config.norm_eps) * size**-0.5
        ids, shares = best(self.router(normed), config.experts_per_token)
        flat = op.reshape(ids, (x.shape[0] * config.experts_per_token,))
        factors = op.take(self.per_expert_scale, flat, axis=0)
        return ids, shares * op.reshape(factors, shares.shape)

    def rows(self, x: Tensor) -> Tensor:
        """Return what the experts read of the residual stream."""
        return self.pre_feedforward_layernorm_2(x)


class LayeredLayer(DecoderLayer):
    """Gemma's block, what the token's own input adds, and a factor on all."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config, layer)
        layered, hidden = config.layered, config.hidden_size
        assert layered is not None
        self.layer, self.width, self.experts = layer, layered.input_size, config.experts
        self.activation = ACTIVATIONS[config.activation]
        self.layer_scalar = nn.Parameter((1,))
        if config.experts:
            self.moe = LayeredExperts(config)
            self.post_feedforward_layernorm_1 = rms_norm(config, hidden)
            self.post_feedforward_layernorm_2 = rms_norm(config, hidden)
        if self.width:
            self.per_layer_input_gate = nn.Linear(hidden, self.width, bias=False)
            self.per_layer_projection = nn.Linear(self.width, hidden, bias=False)
            self.post_per_layer_input_norm = rms_norm(config, hidden)

    def make_attention(self, config: DecoderConfig, layer: int) -> nn.Module:
        """Build the attention."""
        return LayeredAttention(config, layer)

    def make_mlp(self, config: DecoderConfig, layer: int) -> nn.Module:
        """Build the MLP, of the layer's own width."""
        assert config.layered is not None
        return GatedMLP(config, config.layered.inner[layer])

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map the residual stream [tokens, hidden] to the next one."""
        x = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), step)) + x
        inner = self.mlp(self.pre_feedforward_layernorm(x))
        if self.experts:
            inner = self.post_feedforward_layernorm_1(inner)
            inner = inner + self.post_feedforward_layernorm_2(self.moe(x))
        x = self.post_feedforward_layernorm(inner) + x
        if self.width:
            gate = self.activation(self.per_layer_input_gate(x)) * step.inputs[self.layer]
            x = self.post_per_layer_input_norm(self.per_layer_projection(gate)) + x
        return x * self.layer_scalar


class LayeredModel(DecoderModel):
    """A decoder of such layers."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        layered = config.layered
        assert layered is not None
        self.width = layered.input_size
        if self.width:
            rows = config.num_layers * self.width
            self.embed_tokens_per_layer = nn.Embedding(layered.input_vocab, rows)
            self.per_layer_model_projection = nn.Linear(config.hidden_size, rows, bias=False)
            self.per_layer_projection_norm = rms_norm(config, self.width)

    def make_layer(self, config: DecoderConfig, index: int) -> nn.Module:
        """Build one layer."""
        return LayeredLayer(config, index)

    def embed(self, input_ids: Tensor, step: Step) -> Tensor:
        """Return the residual stream's start, and leave each layer's input in the step."""
        hidden = super().embed(input_ids, step)
        if self.width:
            step.inputs = self._inputs(input_ids, hidden)
        return hidden

    def _inputs(self, input_ids: Tensor, hidden: Tensor) -> Sequence[Tensor]:
        """Return what each layer gets of the tokens, [tokens, width] each."""
        layers, tokens = self.config.num_layers, hidden.shape[0]
        shape = (tokens, layers, self.width)
        projected = self.per_layer_model_projection(hidden) * self.config.hidden_size**-0.5
        projected = self.per_layer_projection_norm(op.reshape(projected, shape))
        known = op.reshape(self.embed_tokens_per_layer(input_ids), shape) * self.width**0.5
        both = op.reshape((projected + known) * 2.0**-0.5, (tokens, layers * self.width))
        if layers == 1:
            return [both]
        return op.split(both, layers, axis=-1)


class LayeredLM(CausalLM):
    """A causal language model of such layers."""

    def make_model(self, config: DecoderConfig) -> nn.Module:
        """Build the decoder."""
        return LayeredModel(config)


def weight(name: str, config: DecoderConfig) -> tuple[Weight, ...]:
    """Find a weight: experts are stacked in checkpoints."""
    if ".moe." not in name:
        return (Weight(name),)
    if ".experts." in name:
        return qwen3_moe.weight(name.replace(".moe.", "."), config)
    stem, _, part = name.partition(".moe.")
    known = {"router.weight": "router.proj.weight", "scale": "router.scale"}
    known["per_expert_scale"] = "router.per_expert_scale"
    return (Weight(f"{stem}.{known.get(part, part)}"),)


register(
    ModelFamily(
        name="gemma4",
        architectures=("Gemma4ForCausalLM",),
        model_types=("gemma4_text",),
        configure=configure,
        build=LayeredLM,
        weight=weight,
    )
)
