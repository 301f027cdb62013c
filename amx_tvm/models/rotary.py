"""Rotary embeddings inside the model, for families whose layers do not all rotate alike.

The KV cache rotates on its own where one rotary embedding serves all layers. Otherwise the model
asks the cache for the positions, makes one table of cosines and sines for each different rotary
embedding, once a step, and rotates queries and keys before they enter the cache.
"""

from __future__ import annotations

import numpy as np
from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from relax_passes.attention_spec import Rotation

Tables = tuple[Tensor, Tensor]


def tables(positions: Tensor, rotation: Rotation) -> Tables:
    """Make cosines and sines.

    Parameters
    ----------
    positions : Tensor
        int32 [tokens].
    rotation : Rotation
        The frequencies.

    Returns
    -------
    tuple of Tensor
        float32 [tokens, rotary / 2] each.
    """
    frequencies = np.asarray(rotation.frequencies, np.float32)
    tokens = positions.shape[0]
    angles = op.reshape(positions.astype("float32"), (tokens, 1)) * Tensor.from_const(
        frequencies.reshape(1, -1)
    )
    return _cos_sin(angles, rotation.factor)


def _cos_sin(angles: Tensor, factor: float) -> Tables:
    def table(name: str) -> Tensor:
        function = getattr(tirx, name)

        def build(angle: te.Tensor) -> te.Tensor:
            return te.compute(angle.shape, lambda t, i: function(angle[t, i]) * factor, name)

        return op.tensor_expr_op(build, f"rope_{name}", [angles])

    return table("cos"), table("sin")


def split_long(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Take token ids apart from what they say of their sequences.

    A token of a sequence that is longer than ``DecoderConfig.long_after`` comes as -1 - id.

    Returns
    -------
    tuple of Tensor
        The ids, and 1 for tokens of long sequences and 0 for others, int32 [tokens] each.
    """

    def plain(given: te.Tensor) -> te.Tensor:
        return te.compute(given.shape, lambda t: tirx.max(given[t], -1 - given[t]), "token_ids")

    def long(given: te.Tensor) -> te.Tensor:
        return te.compute(given.shape, lambda t: (given[t] < 0).astype("int32"), "long_sequences")

    return op.tensor_expr_op(plain, "token_ids", [ids]), op.tensor_expr_op(long, "long", [ids])


def tables_by_length(positions: Tensor, long: Tensor, short: Rotation, other: Rotation) -> Tables:
    """Make cosines and sines of two rotary embeddings, for each token that of its sequence.

    Parameters
    ----------
    positions, long : Tensor
        int32 [tokens]; where ``long`` is 1, ``other`` counts.
    short, other : Rotation
        With as many frequencies and the same factor.

    Returns
    -------
    tuple of Tensor
        As :func:`tables` makes them.
    """
    rows = np.asarray([short.frequencies, other.frequencies], np.float32)
    chosen = op.take(Tensor.from_const(rows), long, axis=0)
    tokens = positions.shape[0]
    angles = op.reshape(positions.astype("float32"), (tokens, 1)) * chosen
    return _cos_sin(angles, short.factor)


def rotate(x: Tensor, rope: Tables, heads: int) -> Tensor:
    """Rotate the first heads of fused queries, keys and values.

    Parameters
    ----------
    x : Tensor
        [tokens, heads of q, k and v, head_dim].
    rope : tuple of Tensor
        As :func:`tables` makes them.
    heads : int
        How many of the heads rotate: those of q and k.

    Returns
    -------
    Tensor
        Like x; channel i < rotary / 2 is paired with channel i + rotary / 2.
    """
    dtype = x.dtype

    def build(value: te.Tensor, cos: te.Tensor, sin: te.Tensor) -> te.Tensor:
        half = int(cos.shape[1])

        def at(t, h, i):  # noqa: ANN001, ANN202
            def single(index):  # noqa: ANN001, ANN202
                return value[t, h, index].astype("float32")

            low = single(i) * cos[t, i] - single(i + half) * sin[t, i]
            high = single(i) * cos[t, i - half] + single(i - half) * sin[t, i - half]
            kept = tirx.any(h >= heads, i >= 2 * half)
            rotated = tirx.if_then_else(i < half, low.astype(dtype), high.astype(dtype))
            return tirx.if_then_else(kept, value[t, h, i], rotated)

        return te.compute(value.shape, at, "rotate")

    return op.tensor_expr_op(build, "rotate", [x, *rope])
