"""Multi-head latent attention (DeepSeek): keys and values are computed from one narrow vector.

Here the cache holds the keys and values of all heads, as of any other attention: correct, and
as large as without the narrow vector. A head's channels are put in the order (turned, still), in
which the leading ones rotate; values narrower than keys are filled up with zeros.
"""

from __future__ import annotations

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from amx_tvm.models.config import DecoderConfig, Latent
from amx_tvm.models.routing import RoutedLayer, RoutedLM, RoutedModel
from amx_tvm.models.step import Step, attention_spec

NORM_EPS = 1e-6  # of the narrow vectors, whatever rms_norm_eps is


class LatentAttention(nn.Module):
    """Attention whose queries, keys and values come from narrower vectors."""

    def __init__(self, config: DecoderConfig, latent: Latent, layer: int) -> None:
        hidden, heads, bias = config.hidden_size, config.num_heads, config.qkv_bias
        self.latent, self.heads, self.spec = latent, heads, attention_spec(config, layer)
        queries = heads * (latent.still + latent.turned)
        if latent.query_rank:
            self.q_a_proj = nn.Linear(hidden, latent.query_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(latent.query_rank, -1, NORM_EPS, bias=False)
            self.q_b_proj = nn.Linear(latent.query_rank, queries, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, latent.rank + latent.turned, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(latent.rank, -1, NORM_EPS, bias=False)
        self.kv_b_proj = nn.Linear(latent.rank, heads * (latent.still + latent.value), bias=False)
        self.o_proj = nn.Linear(heads * latent.value, hidden, bias=config.o_bias)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Attend: x [tokens, hidden] -> [tokens, hidden]."""
        latent, heads, tokens = self.latent, self.heads, x.shape[0]
        if latent.query_rank:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        else:
            q = self.q_proj(x)
        narrow, turned = op.split(self.kv_a_proj_with_mqa(x), [latent.rank], axis=-1)
        wide = self.kv_b_proj(self.kv_a_layernorm(narrow))
        wide = op.reshape(wide, (tokens, heads, latent.still + latent.value))
        still, v = op.split(wide, [latent.still], axis=-1)
        turned = op.reshape(turned, (tokens, 1, latent.turned))
        turned = op.broadcast_to(turned, (tokens, heads, latent.turned))
        k = op.concat([turned, still], dim=-1)
        q = op.reshape(q, (tokens, heads, latent.still + latent.turned))
        parts = [self._filled(part) for part in (q, k, v)]
        attended = step.attend(self.spec, op.concat(parts, dim=1))
        if latent.value < self.spec.head_dim:
            attended, _ = op.split(attended, [latent.value], axis=-1)
        return self.o_proj(op.reshape(attended, (tokens, heads * latent.value)))

    def _filled(self, x: Tensor) -> Tensor:
        """Fill the channels of every head up to the head's size in the cache."""
        tokens, heads, size = x.shape
        missing = self.spec.head_dim - int(size)
        if not missing:
            return x
        return op.concat([x, op.zeros((tokens, heads, missing), x.dtype)], dim=-1)


class LatentLayer(RoutedLayer):
    """A decoder layer with latent attention."""

    def make_attention(self, config: DecoderConfig, layer: int) -> nn.Module:
        """Build the attention."""
        assert config.latent is not None
        return LatentAttention(config, config.latent, layer)


class LatentModel(RoutedModel):
    """A decoder of such layers."""

    def make_layer(self, config: DecoderConfig, index: int) -> nn.Module:
        """Build one layer."""
        return LatentLayer(config, index)


class LatentLM(RoutedLM):
    """A causal language model with latent attention."""

    def make_model(self, config: DecoderConfig) -> nn.Module:
        """Build the decoder."""
        return LatentModel(config)
