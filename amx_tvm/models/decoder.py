"""The shared decoder-only transformer, in ordinary Relax ``nn`` linears on the paged KV cache.

Activations are two-dimensional, [tokens, features], from the embedding to the logits: sequences
exist only inside the KV cache, which knows where each token belongs. Module names follow Hugging
Face's Llama. What families do differently is said by :class:`DecoderConfig` where it is common to
some, and by overridden ``make_...`` methods otherwise. Quantization is not mentioned here: passes
find the linears.
"""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.kv_cache import PagedKVCache, create_kv_cache, cuda_attention
from amx_tvm.models.rotary import rotate, split_long
from amx_tvm.models.step import Step, attend
from relax_passes.kernels.cuda import argmax
from relax_passes.kernels.cuda.attention.config import TOKEN
from relax_passes.kernels.cuda.attention.state_text import STATE_WORDS

ACTIVATIONS = {
    "silu": op.silu,
    "gelu": op.gelu,
    "gelu_tanh": lambda x: op.gelu(x, approximate="tanh"),
}


def rms_norm(config: DecoderConfig, size: int) -> nn.RMSNorm:
    """Build an RMSNorm over the last axis."""
    return nn.RMSNorm(size, -1, config.norm_eps, bias=False)


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
        qkv = op.reshape(op.concat([q, k, v], dim=-1), (tokens, heads + 2 * kv, d))
        rope = step.rope(self.layer)
        if rope is not None:
            qkv = rotate(qkv, rope, heads + kv)
        return self.o_proj(op.reshape(attend(step, self.layer, qkv), (tokens, -1)))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
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
        self.placement = config.norm_placement
        self.self_attn = self.make_attention(config, layer)
        self.mlp = self.make_mlp(config, layer)
        size = config.hidden_size
        self.post_attention_layernorm = rms_norm(config, size)
        if self.placement != "post":
            self.input_layernorm = rms_norm(config, size)
        if self.placement != "pre":
            self.post_feedforward_layernorm = rms_norm(config, size)
        if self.placement == "sandwich":
            self.pre_feedforward_layernorm = rms_norm(config, size)

    def make_attention(self, config: DecoderConfig, layer: int) -> nn.Module:
        """Build the attention; families with their own override this."""
        return Attention(config, layer)

    def make_mlp(self, config: DecoderConfig, _layer: int) -> nn.Module:
        """Build the MLP; families with their own override this."""
        return GatedMLP(config)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map the residual stream [tokens, hidden] to the next one."""
        if self.placement == "pre":
            x = self.self_attn(self.input_layernorm(x), step) + x
            return self.mlp(self.post_attention_layernorm(x)) + x
        if self.placement == "post":
            x = self.post_attention_layernorm(self.self_attn(x, step)) + x
            return self.post_feedforward_layernorm(self.mlp(x)) + x
        x = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), step)) + x
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))) + x


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
        return rms_norm(config, config.hidden_size)

    def embed(self, input_ids: Tensor, _step: Step) -> Tensor:
        """Return the residual stream's start [tokens, hidden]."""
        hidden = self.embed_tokens(input_ids)
        scale = self.config.embedding_scale
        return hidden if scale == 1.0 else hidden * scale

    def forward(
        self,
        input_ids: Tensor,
        cache: PagedKVCache,
        state: Tensor | None,
        decoding: bool = False,
        begun: bool = False,
    ) -> Tensor:
        """Map token ids int32 [tokens] to hidden states [tokens, hidden].

        ``decoding`` says that every token continues a sequence of its own, ``begun`` that the
        attention kernels know the pages already.
        """
        step = Step(self.config, cache, state, input_ids.shape[0], decoding)
        if self.config.long_after and step.cuda is None:
            input_ids, step.long = split_long(input_ids)
        hidden = self.embed(input_ids, step)
        if begun:
            step.token = op.empty((1, 1, TOKEN), hidden.dtype)
        else:
            step.begin()
        for layer in self.layers:
            hidden = layer(hidden, step)
        return hidden


class CausalLM(nn.Module):
    """A decoder with an LM head and the functions that the runtime calls.

    Every function takes token ids and the KV cache, writes the new keys and values to the cache and
    returns float32 logits; ``export_spec`` gives their shapes.
    """

    reads_positions = False  # whether the embedding asks the cache for positions

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
        cap = self.config.logit_soft_cap
        return op.tanh(logits * (1.0 / cap)) * cap if cap else logits

    def prefill(
        self, input_ids: Tensor, cache: PagedKVCache, state: Tensor | None = None
    ) -> Tensor:
        """Append one sequence's chunk [1, n]; logits of its last position [1, vocab]."""
        tokens = input_ids.shape[1]
        hidden = self.model(op.reshape(input_ids, (tokens,)), cache, state)
        return self._logits(last_row(hidden))

    def score(self, input_ids: Tensor, cache: PagedKVCache, state: Tensor | None = None) -> Tensor:
        """Append one sequence's chunk [1, n]; logits of every position [n, vocab]."""
        tokens = input_ids.shape[1]
        return self._logits(self.model(op.reshape(input_ids, (tokens,)), cache, state))

    def decode(self, input_ids: Tensor, cache: PagedKVCache, state: Tensor | None = None) -> Tensor:
        """Append one token [1, 1]; its logits [1, vocab]."""
        return self._logits(self.model(op.reshape(input_ids, (1,)), cache, state, True))

    def begin_greedy(self, cache: PagedKVCache, state: Tensor | None = None) -> Tensor:
        """Tell the attention kernels where the pages of the next `decode_greedy` are."""
        step = Step(self.config, cache, state, 1, True)
        step.begin()
        assert step.token is not None
        return step.token

    def decode_greedy(
        self, input_ids: Tensor, cache: PagedKVCache, state: Tensor | None = None
    ) -> Tensor:
        """Append one token [1, 1]; the most likely next one, int32 [1, 1] (-1: NaN)."""
        logits = self._logits(self.model(op.reshape(input_ids, (1,)), cache, state, True, True))
        keys = Tensor.placeholder((argmax.BLOCKS,), "int64")
        token = Tensor.placeholder((1, 1), "int32")
        vocab = int(logits.shape[1])
        best = op.tensor_ir_op(argmax.best(vocab), "argmax_best", [logits], keys)
        return op.tensor_ir_op(argmax.choose(), "argmax_choose", [best], token)

    def decode_batch(
        self, input_ids: Tensor, cache: PagedKVCache, state: Tensor | None = None
    ) -> Tensor:
        """Append one token to each of b sequences [b, 1]; their logits [b, vocab]."""
        batch = input_ids.shape[0]
        return self._logits(self.model(op.reshape(input_ids, (batch,)), cache, state, True))

    def decode_few(
        self, input_ids: Tensor, cache: PagedKVCache, state: Tensor | None = None
    ) -> Tensor:
        """As `decode_batch`, for at most 16 sequences: CPUs have kernels for so few rows."""
        return self.decode_batch(input_ids, cache, state)

    def create_kv_cache(
        self,
        max_batch_size: Any,
        max_total_seq_len: Any,
        prefill_chunk_size: Any,
        page_size: Any,
        support_sliding_window: Any,
    ) -> tuple:
        """Create what the other functions take of the cache; the runtime gives the sizes."""
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
        given: dict[str, Any] = {"cache": nn.spec.Object(object_type=PagedKVCache)}
        if cuda_attention(self.config) is not None:
            given["state"] = nn.spec.Tensor([STATE_WORDS], "int32")
        step = {"param_mode": "packed", "effect_mode": "none"}

        def tokens(shape: list) -> dict:
            ids = nn.spec.Tensor(shape, "int32")
            return {"input_ids": ids, **given, "$": dict(step, param_mode="plain")}

        spec = {
            "prefill": tokens([1, "seq_len"]),
            "score": tokens([1, "seq_len"]),
            "decode": tokens([1, 1]),
            "decode_batch": tokens(["batch", 1]),
            "decode_few": tokens(["few", 1]),
            "create_kv_cache": {
                "max_batch_size": int,
                "max_total_seq_len": int,
                "prefill_chunk_size": int,
                "page_size": int,
                "support_sliding_window": int,
                "$": {"param_mode": "none", "effect_mode": "none"},
            },
        }
        if cuda_attention(self.config) is not None and not self.reads_positions:
            mode = {"param_mode": "none", "effect_mode": "none"}
            spec["begin_greedy"] = {**given, "$": mode}
            spec["decode_greedy"] = tokens([1, 1])
        return nn.spec.ModuleSpec.from_raw(spec, self)


def last_row(x: Tensor) -> Tensor:
    """Return the last row of [tokens, features] as [1, features]."""
    tokens, features = x.shape
    one = relax.op.strided_slice(x._expr, axes=[0], begin=[tokens - 1], end=[tokens])
    builder = relax.BlockBuilder.current()
    one = builder.emit(relax.op.reshape(one, (1, features)))
    return Tensor(_expr=one)
