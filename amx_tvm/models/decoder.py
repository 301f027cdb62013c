"""The shared decoder-only transformer, in ordinary Relax ``nn`` linears on the paged KV cache.

Activations are two-dimensional, [tokens, features], from the embedding to the logits: sequences
exist only inside the KV cache, which knows where each token belongs. Module names follow Hugging
Face, so weights need no renaming. Quantization is not mentioned here: passes find the linears.
"""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.kv_cache import PagedKVCache, create_kv_cache


class Attention(nn.Module):
    """Grouped-query attention; RoPE, the cache and the product with V are one call."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        heads, kv, d = config.num_heads, config.num_kv_heads, config.head_dim
        self.config, self.layer = config, layer
        self.q_proj = nn.Linear(config.hidden_size, heads * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * d, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(d, -1, config.norm_eps, bias=False)
            self.k_norm = nn.RMSNorm(d, -1, config.norm_eps, bias=False)

    def forward(self, x: Tensor, cache: PagedKVCache) -> Tensor:
        """Attend: x [tokens, hidden] -> [tokens, hidden]."""
        heads, kv, d = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        tokens = x.shape[0]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.qk_norm:
            q = op.reshape(self.q_norm(op.reshape(q, (tokens, heads, d))), (tokens, heads * d))
            k = op.reshape(self.k_norm(op.reshape(k, (tokens, kv, d))), (tokens, kv * d))
        qkv = op.reshape(op.concat([q, k, v], dim=-1), (tokens, heads + 2 * kv, d))
        out = attend(cache, self.layer, qkv, heads, self.config.attention_scale)
        return self.o_proj(op.reshape(out, (tokens, heads * d)))


def attend(cache: PagedKVCache, layer: int, qkv: Tensor, heads: int, scale: float) -> Tensor:
    """Rotate, append to the cache and attend: [tokens, heads + 2 kv, d] -> [tokens, heads, d]."""
    tokens, _, d = qkv.shape
    call = relax.call_dps_packed(
        "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
        [cache._expr, relax.prim_value(layer), relax.prim_value(scale), qkv._expr],
        out_ty=relax.TensorType((tokens, heads, d), qkv.dtype),
    )
    return Tensor(_expr=relax.BlockBuilder.current().emit(call))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden] to [tokens, hidden]."""
        return self.down_proj(op.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        eps = config.norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, -1, eps, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, -1, eps, bias=False)

    def forward(self, x: Tensor, cache: PagedKVCache) -> Tensor:
        """Map the residual stream [tokens, hidden] to the next one."""
        x = self.self_attn(self.input_layernorm(x), cache) + x
        return self.mlp(self.post_attention_layernorm(x)) + x


class DecoderModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [self.make_layer(config, index) for index in range(config.num_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, -1, config.norm_eps, bias=False)

    def make_layer(self, config: DecoderConfig, index: int) -> nn.Module:
        """Build one layer; families with their own block override this."""
        return DecoderLayer(config, index)

    def forward(self, input_ids: Tensor, cache: PagedKVCache) -> Tensor:
        """Map token ids int32 [tokens] to hidden states [tokens, hidden]."""
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, cache)
        return hidden


class CausalLM(nn.Module):
    """A decoder with an LM head and the functions that the runtime calls.

    Every function takes token ids and the KV cache, writes the new keys and values to the cache and
    returns float32 logits; ``export_spec`` gives their shapes.
    """

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
        return logits.astype("float32") if logits.dtype != "float32" else logits

    def prefill(self, input_ids: Tensor, cache: PagedKVCache) -> Tensor:
        """Append one sequence's chunk [1, n]; logits of its last position [1, vocab]."""
        tokens = input_ids.shape[1]
        hidden = self.model(op.reshape(input_ids, (tokens,)), cache)
        return self._logits(last_row(hidden))

    def score(self, input_ids: Tensor, cache: PagedKVCache) -> Tensor:
        """Append one sequence's chunk [1, n]; logits of every position [n, vocab]."""
        tokens = input_ids.shape[1]
        return self._logits(self.model(op.reshape(input_ids, (tokens,)), cache))

    def decode(self, input_ids: Tensor, cache: PagedKVCache) -> Tensor:
        """Append one token [1, 1]; its logits [1, vocab]."""
        return self._logits(self.model(op.reshape(input_ids, (1,)), cache))

    def decode_batch(self, input_ids: Tensor, cache: PagedKVCache) -> Tensor:
        """Append one token to each of b sequences [b, 1]; their logits [b, vocab]."""
        batch = input_ids.shape[0]
        return self._logits(self.model(op.reshape(input_ids, (batch,)), cache))

    def create_kv_cache(
        self,
        max_batch_size: Any,
        max_total_seq_len: Any,
        prefill_chunk_size: Any,
        page_size: Any,
        support_sliding_window: Any,
    ) -> PagedKVCache:
        """Create the cache; the arguments are symbolic and given by the runtime."""
        return create_kv_cache(
            self.config,
            max_batch_size,
            max_total_seq_len,
            prefill_chunk_size,
            page_size,
            support_sliding_window,
        )

    def export_spec(self) -> nn.spec.ModuleSpec:
        """Return the input shapes and types of every exported function."""
        cache = nn.spec.Object(object_type=PagedKVCache)
        step = {"param_mode": "packed", "effect_mode": "none"}

        def tokens(shape: list) -> dict:
            ids = nn.spec.Tensor(shape, "int32")
            return {"input_ids": ids, "cache": cache, "$": dict(step, param_mode="plain")}

        spec = {
            "prefill": tokens([1, "seq_len"]),
            "score": tokens([1, "seq_len"]),
            "decode": tokens([1, 1]),
            "decode_batch": tokens(["batch", 1]),
            "create_kv_cache": {
                "max_batch_size": int,
                "max_total_seq_len": int,
                "prefill_chunk_size": int,
                "page_size": int,
                "support_sliding_window": int,
                "$": {"param_mode": "none", "effect_mode": "none"},
            },
        }
        return nn.spec.ModuleSpec.from_raw(spec, self)


def last_row(x: Tensor) -> Tensor:
    """Return the last row of [tokens, features] as [1, features]."""
    tokens, features = x.shape
    one = relax.op.strided_slice(x._expr, axes=[0], begin=[tokens - 1], end=[tokens])
    builder = relax.BlockBuilder.current()
    one = builder.emit(relax.op.reshape(one, (1, features)))
    return Tensor(_expr=one)
