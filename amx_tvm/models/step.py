"""One forward pass as layers see it: the cache, and attention as an operator on it.

What attention computes is said in numbers (``AttentionSpec``); where and how it is done is decided
when it is lowered for a target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.rope import rotation
from relax_passes import ops
from relax_passes.attention_spec import NONE, AttentionSpec


class Step:
    """What layers share during one pass over a number of rows, of any sequences.

    Parameters
    ----------
    cache : PagedKVCache or None
        The function's cache, which knows where each row belongs; None in a `PackedStep`.
    rows : PrimExpr or int
        Rows of the hidden states.
    """

    def __init__(self, cache: Any, rows: Any) -> None:
        self.cache, self.rows = cache, rows
        self.long: Tensor | None = None  # 1 for rows of long sequences, where longrope asks
        # Of layers whose keys and values later ones read too, [rows, kv_heads, d] each.
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.inputs: Sequence[Tensor] = ()  # what each layer gets of the tokens themselves
        self._positions: Tensor | None = None
        self._factors: Tensor | None = None

    def positions(self) -> Tensor:
        """Return each row's position in its sequence, int32 [rows]."""
        if self._positions is None:
            self._positions = self.cache.get_query_positions(self.rows)
        return self._positions

    def query_factors(self, growth: tuple[float, int], dtype: str) -> Tensor:
        """Return the factor on each row's query, [rows, 1]; see ``DecoderConfig.query_growth``."""
        if self._factors is None:
            beta, tokens = growth
            builder = relax.BlockBuilder.current()
            spans = relax.op.floor_divide(self.positions()._expr, relax.const(tokens, "int32"))
            grown = relax.op.log(relax.op.astype(spans, "float32") + relax.const(1.0, "float32"))
            factors = grown * relax.const(beta, "float32") + relax.const(1.0, "float32")
            column = relax.op.expand_dims(relax.op.astype(factors, dtype), 1)
            self._factors = Tensor(_expr=builder.emit(column))
        return self._factors

    def attend(self, spec: AttentionSpec, qkv: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Append keys and values of one layer to the cache and attend.

        Parameters
        ----------
        spec : AttentionSpec
            The layer's attention.
        qkv : Tensor
            [rows, heads + 2 kv_heads, d], not rotated.
        sinks : Tensor, optional
            [heads], where the spec has sinks.

        Returns
        -------
        Tensor
            [rows, heads, d].
        """
        logits, long = (x._expr if x is not None else None for x in (sinks, self.long))
        call = ops.attention(qkv._expr, self.cache._expr, spec, logits, long)
        return Tensor(_expr=relax.BlockBuilder.current().emit(call))


class PackedStep(Step):
    """One pass over several whole texts that lie one behind the other, without a cache.

    Parameters
    ----------
    positions : Tensor
        int32 [rows]: each row's position in its text.
    bounds : Tensor
        int32 [texts + 1]: the first row of each text, and the end.
    causal : bool
        Whether rows see no later ones.
    """

    def __init__(self, positions: Tensor, bounds: Tensor, causal: bool) -> None:
        super().__init__(None, positions.shape[0])
        self._positions, self._bounds, self._causal = positions, bounds, causal

    def attend(self, spec: AttentionSpec, qkv: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Attend inside each text; shapes as in `Step.attend`."""
        arguments = (qkv._expr, self._bounds._expr, self.positions()._expr)
        call = ops.packed_attention(*arguments, spec, self._causal)
        return Tensor(_expr=relax.BlockBuilder.current().emit(call))


def attention_spec(config: DecoderConfig, layer: int) -> AttentionSpec:
    """Return what the attention of a layer computes."""
    return AttentionSpec(
        layer,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.attention_scale,
        window=config.sliding_window if config.slides(layer) else 0,
        soft_cap=config.attention_soft_cap,
        sinks=config.attention_sinks,
        rotation=rotation(config, layer),
        long_rotation=rotation(config, layer, config.context_length) if config.long_after else NONE,
    )


def split_long(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Take token ids apart from what they say of their sequences.

    A token of a sequence that is longer than ``DecoderConfig.long_after`` comes as -1 - id.

    Returns
    -------
    tuple of Tensor
        The ids, and 1 for tokens of long sequences and 0 for others, int32 [rows] each.
    """
    builder, given = relax.BlockBuilder.current(), ids._expr
    other = builder.emit(relax.op.subtract(relax.const(-1, "int32"), given))
    plain = builder.emit(relax.op.maximum(given, other))
    negative = builder.emit(relax.op.less(given, relax.const(0, "int32")))
    long = builder.emit(relax.op.astype(negative, "int32"))
    return Tensor(_expr=plain), Tensor(_expr=long)


def with_given(
    ids: Tensor, given: Tensor, vocab_size: int, embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """Start a residual stream of which some rows are given, such as those of an image.

    Parameters
    ----------
    ids : Tensor
        int32 [rows]: tokens, and vocab_size + i for row i of the table.
    given : Tensor
        [n, hidden]: a table of rows; at least one.
    vocab_size : int
        How many tokens there are.
    embed : callable
        Makes the rows of tokens.

    Returns
    -------
    Tensor
        [rows, hidden].
    """
    builder, end = relax.BlockBuilder.current(), relax.const(vocab_size, "int32")
    last, none = relax.const(vocab_size - 1, "int32"), relax.const(0, "int32")
    known = embed(Tensor(_expr=builder.emit(relax.op.minimum(ids._expr, last))))
    place = builder.emit(relax.op.maximum(relax.op.subtract(ids._expr, end), none))
    rows = builder.emit(relax.op.take(given._expr, place, axis=0))
    token = builder.emit(relax.op.expand_dims(relax.op.less(ids._expr, end), 1))
    return Tensor(_expr=builder.emit(relax.op.where(token, known._expr, rows)))


def kv_cache(*sizes: Any) -> nn.Object:
    """Create the cache, in a method that is being exported.

    Parameters
    ----------
    sizes : PrimExpr or int
        Most sequences, tokens of all sequences, tokens of one pass.
    """
    return nn.Object(_expr=ops.kv_cache(relax.ShapeExpr(list(sizes))), _name="cache")
