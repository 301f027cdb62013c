"""What a GGUF file says about the scaling of its rotary embedding, as a "rope_scaling" dictionary.

llama.cpp reads a factor without a type as linear scaling, and "rope.scale_linear" where an old
file has no "rope.scaling.factor"; so does this. It multiplies YaRN's attention factor by
``attn_factor`` and rounds the ends of its ramp to whole channels, as transformers does by default.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.frontends.gguf.keys import ModelKeys

# Llama 3.1 and 3.2 publish one set of values and two factors (8 and 32).
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
FREQUENCIES, LONG, SHORT = "rope_freqs", "rope_factors_long", "rope_factors_short"
FACTOR_TENSORS = tuple(f"{name}.weight" for name in (FREQUENCIES, LONG, SHORT))


def read_rope_scaling(
    keys: ModelKeys, config: dict[str, Any], rotated: int, factors: dict[str, np.ndarray]
) -> dict[str, Any] | None:
    """Return "rope_scaling" from the scaling keys and the tables of frequency factors.

    Parameters
    ----------
    keys : ModelKeys
        The file's keys.
    config : dict
        The configuration so far.
    rotated : int
        Channels of a head that rotate.
    factors : dict of str to numpy.ndarray
        Tables [rotated / 2], by the names above.

    Raises
    ------
    ModelError
        For a scaling that is not known, or a table that does not fit.
    """
    factor = keys.number("rope.scaling.factor")
    if factor is None:
        factor = keys.number("rope.scale_linear")
    factor = float(factor or 1.0)
    kind = keys.text("rope.scaling.type") or ("linear" if factor != 1.0 else "none")
    original = keys.number("rope.scaling.original_context_length")
    for name, table in factors.items():
        if table.shape != (rotated // 2,):
            raise ModelError(
                f"tensor '{name}.weight' in {keys.path} has the shape {list(table.shape)}; "
                f"{rotated // 2} factors were expected"
            )
    if LONG in factors or SHORT in factors:
        if not (LONG in factors and SHORT in factors and original):
            raise ModelError(
                f"{keys.path} lacks one of '{LONG}.weight', '{SHORT}.weight' and the key "
                f"'{keys.name}.rope.scaling.original_context_length', which belong together"
            )
        return _longrope(keys, config, int(original), factors)
    if FREQUENCIES in factors:
        if kind == "yarn" or factor != 1.0:
            raise ModelError(
                f"{keys.path} has both the tensor '{FREQUENCIES}.weight' and the RoPE scaling "
                f"{kind!r} by {factor:g}; one of them was expected"
            )
        return _factors_to_scaling(factors[FREQUENCIES], config, rotated)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(keys, factor, original)
    raise ModelError(
        f"{keys.path} has the RoPE scaling {kind!r}; supported are linear, yarn, and tables of "
        "factors"
    )


def _yarn(keys: ModelKeys, factor: float, original: Any) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if original is not None:
        scaling["original_max_position_embeddings"] = int(original)
    for key in ("beta_fast", "beta_slow"):
        value = keys.number(f"rope.scaling.yarn_{key}")
        if value is not None:
            scaling[key] = float(value)
    keys.equal("rope.scaling.yarn_ext_factor", 1.0)
    weight = keys.number("rope.scaling.yarn_log_multiplier")
    if weight:
        scaling |= {"mscale": 1.0, "mscale_all_dim": float(weight)}
    attention = 1.0
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        attention *= float(keys.number(key, 1.0))
    if attention != 1.0 and not weight:
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    elif attention != 1.0:
        keys.equal("rope.scaling.attn_factor", 1.0)
        keys.equal("rope.scaling.yarn_attn_factor", 1.0)
    return scaling


def _longrope(
    keys: ModelKeys, config: dict[str, Any], original: int, factors: dict[str, np.ndarray]
) -> dict[str, Any]:
    config["original_max_position_embeddings"] = original
    attention = keys.number("rope.scaling.attn_factor")
    return {
        "rope_type": "longrope",
        "short_factor": [float(value) for value in factors[SHORT]],
        "long_factor": [float(value) for value in factors[LONG]],
        "original_max_position_embeddings": original,
        **({} if attention is None else {"attention_factor": float(attention)}),
    }


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """Return what "llama3" scaling divides each of the head_dim / 2 frequencies by, float64."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = LLAMA3_CONTEXT * frequencies / (2 * math.pi)
    smooth = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _factors_to_scaling(
    factors: np.ndarray, config: dict[str, Any], rotated: int
) -> dict[str, Any]:
    """Recover the published "llama3" parameters, or keep the table itself as "longrope"."""
    factor = float(factors.max())
    expected = llama3_factors(rotated, config["rope_theta"], factor)
    if np.allclose(factors, expected, rtol=1e-4):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_position_embeddings": LLAMA3_CONTEXT,
        }
    table = [float(value) for value in factors]
    return {
        "rope_type": "longrope",
        "short_factor": table,
        "long_factor": table,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }
