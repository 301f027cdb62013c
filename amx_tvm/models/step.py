"""One forward pass as layers see it: the KV cache, positions, rotary tables; and attention."""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.relax.frontend.nn import Tensor
from tvm.target import Target

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.kv_cache import PagedKVCache
from amx_tvm.models.rotary import Tables, tables


class Step:
    """What layers share during one pass over a number of tokens.

    Parameters
    ----------
    config : DecoderConfig
        The model's shape.
    cache : PagedKVCache
        The function's cache.
    tokens : PrimExpr or int
        Rows of the hidden states.
    """

    def __init__(self, config: DecoderConfig, cache: PagedKVCache, tokens: Any) -> None:
        self.config, self.cache, self.tokens = config, cache, tokens
        self._positions: Tensor | None = None
        self._tables: list[tuple[Any, Tables]] = []

    def positions(self) -> Tensor:
        """Return each token's position in its sequence, int32 [tokens]."""
        if self._positions is None:
            self._positions = self.cache.get_query_positions(self.tokens)
        return self._positions

    def rope(self, layer: int) -> Tables | None:
        """Return a layer's cosines and sines; None where the cache or nobody rotates."""
        ropes = self.config.layer_ropes
        wanted = ropes[layer] if ropes else None
        if wanted is None:
            return None
        for known, made in self._tables:
            if known == wanted:
                return made
        self._tables.append((wanted, tables(self.positions(), wanted, self.config)))
        return self._tables[-1][1]


def attend(cache: PagedKVCache, config: DecoderConfig, layer: int, qkv: Tensor) -> Tensor:
    """Append keys and values to the cache and attend.

    Parameters
    ----------
    cache : PagedKVCache
        The function's cache; it also rotates, unless layers have their own rotary embeddings.
    config : DecoderConfig
        The model's shape.
    layer : int
        Which layer's pages.
    qkv : Tensor
        [tokens, heads + 2 kv, d].

    Returns
    -------
    Tensor
        [tokens, heads, d].
    """
    tokens, _, d = qkv.shape
    scale = config.attention_scale
    if config.slides(layer) and Target.current(allow_none=False).kind.name == "llvm":
        scale = -scale  # how the CPU kernels are told of a sliding layer
    call = relax.call_dps_packed(
        "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
        [cache._expr, relax.prim_value(layer), relax.prim_value(scale), qkv._expr],
        out_ty=relax.TensorType((tokens, config.num_heads, d), qkv.dtype),
    )
    return Tensor(_expr=relax.BlockBuilder.current().emit(call))
