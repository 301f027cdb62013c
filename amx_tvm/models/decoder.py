"""The shared decoder-only transformer, in ordinary Relax ``nn`` linears on the paged KV cache.

Activations are two-dimensional, [tokens, features], from the embedding to the logits: sequences
exist only inside the KV cache, which knows where each token belongs. Module names follow Hugging
Face's Llama. What families do differently is said by :class:`DecoderConfig` where it is common to
some, and by overridden ``make_...`` methods otherwise. Quantization is not mentioned here: passes
find the linears.
"""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.step import Step, attention_spec, kv_cache, split_long, with_given

ACTIVATIONS = {
    "silu": op.silu,
    "gelu": op.gelu,
    "gelu_tanh": lambda x: op.gelu(x, approximate="tanh"),
}


def rms_norm(config: DecoderConfig, size: int) -> nn.RMSNorm:
    """Build an RMSNorm over the last axis."""
    return nn.RMSNorm(size, -1, config.norm_eps, bias=False)


class WeightedLayerNorm(nn.Module):
    """LayerNorm over the last axis without a bias."""

    def __init__(self, size: int, eps: float) -> None:
        self.size, self.eps = size, eps
        self.weight = nn.Parameter((size,))

    def forward(self, x: Tensor) -> Tensor:
        """Map [tokens, size] to [tokens, size]."""
        return op.layer_norm(x, self.size, self.weight, eps=self.eps)


def block_norm(config: DecoderConfig, behind: bool = False) -> nn.Module:
    """Build the norm of a residual stream, or of what a block in front adds to it."""
    size, eps = config.hidden_size, config.norm_eps if behind else config.stream_eps
    if config.norm == "layer":
        return nn.LayerNorm(size, eps)
    if config.norm == "layer_weight":
        return WeightedLayerNorm(size, eps)
    return nn.RMSNorm(size, -1, eps, bias=False)


class Attention(nn.Module):
    """Grouped-query attention; RoPE, the cache and the product with V are one operator."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        heads, kv, d = config.num_heads, config.num_kv_heads, config.head_dim
        self.config, self.spec = config, attention_spec(config, layer)
        self.q_proj = nn.Linear(config.hidden_size, heads * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * d, config.hidden_size, bias=config.o_bias)
        self.sinks = nn.Parameter((heads,)) if config.attention_sinks else None
        if config.qk_norm:
            full = config.qk_norm == "full"
            self.q_norm = rms_norm(config, heads * d if full else d)
            self.k_norm = rms_norm(config, kv * d if full else d)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Attend: x [tokens, hidden] -> [tokens, hidden]."""
        config = self.config
        heads, kv, d = config.num_heads, config.num_kv_heads, config.head_dim
        tokens = x.shape[0]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        elif config.qk_norm == "head":
            q = op.reshape(self.q_norm(op.reshape(q, (tokens, heads, d))), (tokens, heads * d))
            k = op.reshape(self.k_norm(op.reshape(k, (tokens, kv, d))), (tokens, kv * d))
        if config.query_growth:
            q = q * step.query_factors(config.query_growth, q.dtype)
        qkv = op.reshape(op.concat([q, k, v], dim=-1), (tokens, heads + 2 * kv, d))
        attended = step.attend(self.spec, qkv, self.sinks)
        return self.o_proj(op.reshape(attended, (tokens, -1)))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, inner: int | None = None) -> None:
        hidden = config.hidden_size
        inner = config.intermediate_size if inner is None else inner
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden] to [tokens, hidden]."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream, with norms before or behind them.

    Norms have Hugging Face's names, in which ``post_attention_layernorm`` stands before the MLP
    where norms are only in front of the blocks, and behind the attention otherwise.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        self.placement, self.scale = config.norm_placement, config.residual_scale
        self.self_attn = self.make_attention(config, layer)
        self.mlp = self.make_mlp(config, layer)
        if self.placement != "parallel":
            behind = self.placement in ("post", "sandwich")
            self.post_attention_layernorm = block_norm(config, behind)
        if self.placement != "post":
            self.input_layernorm = block_norm(config)
        if self.placement in ("post", "sandwich"):
            self.post_feedforward_layernorm = block_norm(config, behind=True)
        if self.placement == "sandwich":
            self.pre_feedforward_layernorm = block_norm(config)

    def make_attention(self, config: DecoderConfig, layer: int) -> nn.Module:
        """Build the attention; families with their own override this."""
        return Attention(config, layer)

    def make_mlp(self, config: DecoderConfig, _layer: int) -> nn.Module:
        """Build the MLP; families with their own override this."""
        return GatedMLP(config)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map the residual stream [tokens, hidden] to the next one."""
        if self.placement == "pre":
            x = self._scaled(self.self_attn(self.input_layernorm(x), step)) + x
            return self._scaled(self.mlp(self.post_attention_layernorm(x))) + x
        if self.placement == "parallel":
            normed = self.input_layernorm(x)
            return self.self_attn(normed, step) + self.mlp(normed) + x
        if self.placement == "post":
            x = self.post_attention_layernorm(self.self_attn(x, step)) + x
            return self.post_feedforward_layernorm(self.mlp(x)) + x
        x = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), step)) + x
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))) + x

    def _scaled(self, added: Tensor) -> Tensor:
        return added if self.scale == 1.0 else added * self.scale


class DecoderModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [self.make_layer(config, index) for index in range(config.num_layers)]
        )
        self.norm = self.make_norm(config)

    def make_layer(self, config: DecoderConfig, index: int) -> nn.Module:
        """Build one layer; families with their own block override this."""
        return DecoderLayer(config, index)

    def make_norm(self, config: DecoderConfig) -> nn.Module:
        """Build the final norm."""
        return block_norm(config)

    def embed(self, input_ids: Tensor, _step: Step) -> Tensor:
        """Return the residual stream's start [tokens, hidden]."""
        hidden = self.embed_tokens(input_ids)
        scale = self.config.embedding_scale
        return hidden if scale == 1.0 else hidden * scale

    def forward(
        self, input_ids: Tensor, cache: PagedKVCache, given: Tensor | None = None
    ) -> Tensor:
        """Map token ids int32 [rows] to hidden states [rows, hidden]; see `with_given`."""
        step = Step(cache, input_ids.shape[0])
        if self.config.long_after:
            input_ids, step.long = split_long(input_ids)
        return self.run(input_ids, step, given)

    def run(self, input_ids: Tensor, step: Step, given: Tensor | None = None) -> Tensor:
        """Return the hidden states [rows, hidden] of a pass, not normed."""
        if given is None:
            hidden = self.embed(input_ids, step)
        else:
            vocab = self.config.vocab_size
            hidden = with_given(input_ids, given, vocab, lambda ids: self.embed(ids, step))
        for layer in self.layers:
            hidden = layer(hidden, step)
        return hidden


class CausalLM(nn.Module):
    """A decoder with an LM head, and the two functions that are exported of it."""

    vision: nn.Module | None = None  # maps patches of images to rows of prompts

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self.model = self.make_model(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def make_model(self, config: DecoderConfig) -> nn.Module:
        """Build the decoder; families with their own layers override this."""
        return DecoderModel(config)

    def _logits(self, hidden: Tensor) -> Tensor:
        hidden = self.model.norm(hidden)
        if self.config.tie_embeddings:
            weight = self.model.embed_tokens.weight
            logits = op.matmul(hidden, op.permute_dims(weight))
        else:
            logits = self.lm_head(hidden)
        logits = logits.astype("float32") if logits.dtype != "float32" else logits
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_soft_cap
        return op.tanh(logits * (1.0 / cap)) * cap if cap else logits

    def forward(self, input_ids: Tensor, logit_positions: Tensor, cache: PagedKVCache) -> Tensor:
        """Append rows to their sequences; the logits that follow some of them.

        Parameters
        ----------
        input_ids : Tensor
            int32 [rows]: tokens of any sequences, those of one in a row; which, the cache knows.
        logit_positions : Tensor
            int32 [picks]: the rows whose logits are wanted.
        cache : PagedKVCache
            Keys and values, to which the rows' are added.

        Returns
        -------
        Tensor
            float32 [picks, vocab].
        """
        return self._logits(op.take(self.model(input_ids, cache), logit_positions, axis=0))

    def forward_given(
        self, input_ids: Tensor, given: Tensor, logit_positions: Tensor, cache: PagedKVCache
    ) -> Tensor:
        """Do what `forward` does with rows of which some are given [n, hidden]: vocab_size + i."""
        hidden = self.model(input_ids, cache, given)
        return self._logits(op.take(hidden, logit_positions, axis=0))

    def see(self, patches: Tensor) -> Tensor:
        """Map patches float32 [tiles, patches, values] to rows of a prompt [n, hidden]."""
        assert self.vision is not None
        return self.vision(patches)

    def create_kv_cache(
        self, max_batch_size: Any, max_total_seq_len: Any, prefill_chunk_size: Any
    ) -> nn.Object:
        """Create the cache; the runtime gives the sizes."""
        return kv_cache(max_batch_size, max_total_seq_len, prefill_chunk_size)

    def export_spec(self) -> nn.spec.ModuleSpec:
        """Return the input shapes and types of the exported functions."""
        modes = {"param_mode": "plain", "effect_mode": "none"}
        forward = {
            "input_ids": nn.spec.Tensor(["rows"], "int32"),
            "logit_positions": nn.spec.Tensor(["picks"], "int32"),
            "cache": nn.spec.Object(object_type=PagedKVCache),
            "$": modes,
        }
        create = {
            "max_batch_size": int,
            "max_total_seq_len": int,
            "prefill_chunk_size": int,
            "$": {"param_mode": "none", "effect_mode": "none"},
        }
        functions: dict[str, Any] = {"forward": forward, "create_kv_cache": create}
        if self.vision is not None:
            given = nn.spec.Tensor(["given", self.config.hidden_size], "float32")
            patches = nn.spec.Tensor(["tiles", *self.vision.patches], "float32")
            ids = {"input_ids": forward["input_ids"], "given": given}
            functions |= {"forward_given": ids | forward, "see": {"patches": patches, "$": modes}}
        return nn.spec.ModuleSpec.from_raw(functions, self)
