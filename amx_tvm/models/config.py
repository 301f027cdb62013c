"""The shape of a decoder-only transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"

# Linears that share a flag for their biases: the DecoderConfig's field without "_bias".
BIAS_GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
# A field that :mod:`amx_tvm.frontends.checkpoint` adds: groups of biases that are stored although
# the configuration asks for none. Of such a group, a bias that is missing is zero.
STORED_BIASES = "stored_biases"


@dataclass(frozen=True)
class Rope:
    """One rotary embedding: its base, and the scaling dictionary (empty when plain)."""

    theta: float
    scaling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Routing:
    """How a row chooses experts where it is not the softmax's best ones with their softmax.

    Parameters
    ----------
    score : str
        What an expert's share is made of: "sigmoid" of its logit, or "softmax" over all of them.
    bias : bool
        A learned number is added to each expert's score for the choice, not for its share.
    groups, chosen_groups : int
        Experts lie in so many groups, of which the best so many may be chosen from.
    group_best : int
        A group is as good as the sum of its best so many scores, 1 or 2.
    normed : bool
        Shares are divided by their sum.
    scale : float
        Factor on the shares.
    """

    score: str
    bias: bool = False
    groups: int = 1
    chosen_groups: int = 1
    group_best: int = 2
    normed: bool = True
    scale: float = 1.0


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek): channels of a head, and ranks of its projections.

    Parameters
    ----------
    rank, query_rank : int
        Width of what keys and values are computed from, and of what queries are; 0: of nothing
        narrower than the hidden state.
    still, turned : int
        Channels of queries and keys without and with rotary embedding; the latter's key is one for
        all heads.
    value : int
        Channels of a value.
    """

    rank: int
    query_rank: int
    still: int
    turned: int
    value: int


@dataclass(frozen=True)
class Layered:
    """What differs from layer to layer (Gemma 4); the cache has the largest of each.

    Parameters
    ----------
    sizes, kv_heads : tuple of int
        Channels of a head, and heads of keys and values.
    sources : tuple of int
        The layer whose keys and values one reads; its own number where it has some.
    inner : tuple of int
        Intermediate size of the MLP.
    values_of_keys : tuple of bool
        Whether values come from the projection of the keys.
    input_size, input_vocab : int
        Width of what every layer gets of the token itself (0: nothing), and rows of its table.
    """

    sizes: tuple[int, ...]
    kv_heads: tuple[int, ...]
    sources: tuple[int, ...]
    inner: tuple[int, ...]
    values_of_keys: tuple[bool, ...]
    input_size: int = 0
    input_vocab: int = 0


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that the shared decoder needs; a family fills in what it does differently.

    Sizes are counts of features; ``context_length`` and positions are in tokens.

    Parameters
    ----------
    norm_placement : str
        "pre" (Llama: norms in front of attention and MLP), "post" (OLMo 2: behind them),
        "sandwich" (Gemma: both) or "parallel" (Cohere: one norm in front of both, which are added).
    norm : str
        "rms" (RMSNorm), "layer" (LayerNorm) or "layer_weight" (LayerNorm without bias).
    qk_norm : str
        "" (none), "head" (RMSNorm of each head's query and key) or "full" (of all heads at once).
    activation : str
        "silu", "gelu" (erf) or "gelu_tanh".
    layer_kinds : tuple of str
        "full_attention" or "sliding_attention" for each layer; empty when all are full.
    layer_ropes : tuple of Rope or None
        The rotary embedding of each layer, None where a layer has none; empty when all layers use
        ``rope_theta`` and ``rope_scaling``.
    rotary_dim : int or None
        Leading channels of a head that rotate; None rotates all of them.
    attention_factor : float or None
        Factor on q k^T; None is 1 / sqrt(head_dim).
    attention_soft_cap, logit_soft_cap : float
        Bound c of c tanh(s / c) on scores and logits; 0 leaves them.
    query_growth : tuple of float and int, or None
        (beta, tokens): queries at a position are multiplied by 1 + beta ln(1 + position // tokens).
    embedding_scale, residual_scale, logit_scale : float
        Factors on the embeddings, on what attention and MLP add to the residual stream, and on the
        logits.
    stream_scale : float
        A power of two by which the whole residual stream is smaller than the checkpoint's, so that
        float16 holds it. Norms in front of blocks undo it, exactly: their epsilon shrinks with it.
    experts, experts_per_token, expert_size : int
        Experts of an MLP (0: none), how many of them a token takes, and their intermediate size.
    shares_of_all : bool
        A chosen expert's share is its part of the softmax over all experts, not over the chosen.
    router_bias : bool
        The router has a bias.
    routing : Routing or None
        Another choice and shares than the softmax's.
    shared_size : int
        Intermediate size of an expert that every token takes beside the chosen ones; 0: none.
    gate_alpha, gate_limit : float
        Of gpt-oss's gate: the sigmoid's slope, and the bound of both its inputs.
    dense_layers : tuple of int
        Layers with one dense MLP in a model with experts.
    latent : Latent or None
        Queries, keys and values come from narrower vectors.
    layered : Layered or None
        Layers of different sizes, or that share keys and values.
    attention_sinks : bool
        Each head has a learned logit that takes part in the softmax and adds nothing.
    causal : bool
        Tokens see no later ones; False in models of embeddings that look both ways.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""
    norm: str = "rms"
    norm_placement: str = "pre"
    activation: str = "silu"
    layer_kinds: tuple[str, ...] = ()
    sliding_window: int = 0
    layer_ropes: tuple[Rope | None, ...] = ()
    rotary_dim: int | None = None
    attention_factor: float | None = None
    attention_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    query_growth: tuple[float, int] | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    stream_scale: float = 1.0
    logit_scale: float = 1.0
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shares_of_all: bool = False
    router_bias: bool = False
    routing: Routing | None = None
    shared_size: int = 0
    gate_alpha: float = 1.0
    gate_limit: float = 0.0
    dense_layers: tuple[int, ...] = ()
    latent: Latent | None = None
    layered: Layered | None = None
    attention_sinks: bool = False
    causal: bool = True

    @property
    def stream_eps(self) -> float:
        """Epsilon of norms of the residual stream."""
        return self.norm_eps * self.stream_scale**2

    @property
    def attention_scale(self) -> float:
        """Factor on q k^T."""
        return self.head_dim**-0.5 if self.attention_factor is None else self.attention_factor

    @property
    def cached_layers(self) -> int:
        """How many layers have keys and values of their own."""
        return self.num_layers if self.layered is None else len(set(self.layered.sources))

    @property
    def long_after(self) -> int:
        """Length after which a sequence turns by longrope's other table; 0 where none does."""
        scaling = self.rope_scaling
        if scaling.get("rope_type") != "longrope" or self.layer_ropes:
            return 0
        trained = int(scaling.get("original_max_position_embeddings") or self.context_length)
        same = scaling.get("short_factor") == scaling.get("long_factor")
        return trained if trained < self.context_length and not same else 0

    def rope(self, layer: int) -> Rope | None:
        """Return the rotary embedding of a layer, None where it has none."""
        if self.layer_ropes:
            return self.layer_ropes[layer]
        return Rope(self.rope_theta, self.rope_scaling)

    def slides(self, layer: int) -> bool:
        """Whether a layer's queries see only the last ``sliding_window`` keys."""
        return bool(self.layer_kinds) and self.layer_kinds[layer] == SLIDING
