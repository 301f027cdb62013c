"""Keys as loud as their queries, channel by channel, in front of a rounding of keys.

    score = sum of q_c k_c = sum of (q_c s_c) (k_c / s_c)

Where a Hadamard matrix spreads a rounding's error evenly over a head's channels, the score's error
grows with |q| |k|, which s^2 = |k_c| / |q_c| makes least (Cauchy and Schwarz). Models differ: keys
of Qwen2 have channels with biases a hundred times the others, which queries hardly look at. Both
channels of a pair that turns get one factor, so that the rotary embedding changes nothing, and all
query heads of a key's head too. Factors go into weights, so nothing is added at run time:

    heads are normed     into the norms' weights, as they are
    otherwise            into the rows of q_proj and k_proj and their biases, as powers of two:
                         codes and calibrated roundings of these weights stay, scales take them
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from amx_tvm.formats import Quantized
from amx_tvm.frontends import ModelSource
from amx_tvm.models import DecoderConfig
from amx_tvm.models.rope import rotation

_NAME = re.compile(r"(model\.layers\.(\d+)\.self_attn\.)([qk])_(proj|norm)\.(?:weight|bias)")
# A channel that is silent counts as this share of the mean, a factor is at most 2 to this power.
LEAST, MOST = 1e-6, 3


class Balance:
    """Factors on the rows of a model's weights that keep attention's scores as they are.

    Loudness is estimated from weights: a row's sum of squares times the mean square of the norm in
    front, plus its bias squared; behind a norm of heads, that norm's weight squared.

    Parameters
    ----------
    source : ModelSource
        The weights, under the module's names.
    decoder : DecoderConfig
        Its shape.
    """

    def __init__(self, source: ModelSource, decoder: DecoderConfig) -> None:
        self._source, self._decoder, self._names = source, decoder, set(source.names())
        self._factors = cache(self._made)

    def of(self, name: str) -> np.ndarray | None:
        """Return the factors float32 [rows] of a weight or bias; None where it stays."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        normed = bool(self._decoder.qk_norm)
        if normed != (found[4] == "norm"):
            return None
        both = self._factors(found[1], int(found[2]))
        return None if both is None else both["qk".index(found[3])]

    def _made(self, prefix: str, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the factors of a layer's queries and of its keys, by rows."""
        decoder = self._decoder
        d, kv = decoder.head_dim, decoder.num_kv_heads
        norm = decoder.qk_norm
        part = "norm" if norm else "proj"
        names = [f"{prefix}{which}_{part}.weight" for which in "qk"]
        rows = [d, d] if norm == "head" else [decoder.num_heads * d, kv * d]
        if any(name not in self._names for name in names) or rows != [
            self._source.shape(name)[0] for name in names
        ]:
            return None
        heads = 1 if norm == "head" else kv
        queries, keys = (self._loudness(name, prefix) for name in names)
        queries, keys = (x.reshape(heads, -1, d).mean(1) for x in (queries, keys))
        factor = balanced(queries, keys, rotation(decoder, layer).pairs)
        if not norm:
            factor = np.exp2(np.rint(np.log2(factor)))
        if norm != "head":
            spread = np.repeat(factor, decoder.num_heads // kv, axis=0)
            return spread.reshape(-1), 1 / factor.reshape(-1)
        return factor[0], 1 / factor[0]

    def _loudness(self, name: str, prefix: str) -> np.ndarray:
        """Return the mean square of each row of queries or keys, up to a factor on all."""
        weight = self._source.load(name)
        if weight.ndim == 1:
            return np.square(weight)
        front = prefix.removesuffix("self_attn.") + "input_layernorm.weight"
        level = np.square(self._source.load(front)).mean() if front in self._names else 1.0
        loud = np.square(weight).sum(1) * np.float32(level)
        bias = name.removesuffix("weight") + "bias"
        return loud + np.square(self._source.load(bias)) if bias in self._names else loud


def balanced(queries: np.ndarray, keys: np.ndarray, pairs: int) -> np.ndarray:
    """Return the factors float32 [heads, d] on queries; keys are divided by them.

    Parameters
    ----------
    queries, keys : ndarray
        Mean squares of channels, float32 [heads, d].
    pairs : int
        Channels from the first on that turn with the one so many behind them.
    """
    logs = []
    for square in (queries, keys):
        square = square.astype(np.float64)
        square[:, :pairs] += square[:, pairs : 2 * pairs]
        square[:, pairs : 2 * pairs] = square[:, :pairs]
        silent = LEAST * square.mean(1, keepdims=True) + np.finfo(np.float64).tiny
        logs.append(np.log2(square + silent))
    factor = (logs[1] - logs[0]) / 4
    factor -= factor.mean(1, keepdims=True)
    return np.exp2(factor.clip(-MOST, MOST)).astype(np.float32)


def scaled(quantized: Quantized, factors: np.ndarray) -> Quantized:
    """Multiply the rows of a quantized matrix [N, K] by powers of two [N]: its codes stay.

    A group whose scale leaves its type's range is rounded to it.
    """
    fmt = quantized.format
    powers = np.log2(factors).astype(np.int32)[:, None]
    if fmt.row_scaled:
        rows = np.broadcast_to(np.asarray(quantized.tensor_scale), factors.shape)
        return Quantized(quantized.codes, quantized.scales, fmt, rows * factors)
    scales = dict(quantized.scales)
    for name in {term.scale for term in fmt.terms}:
        scales[name] = fmt.scale_tensor(name).type.times(scales[name], powers)
    return Quantized(quantized.codes, scales, fmt, quantized.tensor_scale)
