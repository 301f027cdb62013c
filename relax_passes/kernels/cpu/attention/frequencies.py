"""Inverse frequencies of rotary position embeddings, from a Hugging Face ``rope_scaling``.

The arithmetic follows transformers' ``modeling_rope_utils`` in float32, with powers rounded from
float64: positions up to 131072 multiply every unit in the last place of a frequency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from amx_tvm.errors import ModelError

from .config import KVCacheConfig

_SUPPORTED = "default, linear, dynamic, llama3, yarn, longrope"


def rope_type(config: KVCacheConfig) -> str:
    """Name of the scaling rule ("default" when there is none)."""
    scaling = config.rope_scaling or {}
    return scaling.get("rope_type", scaling.get("type")) or "default"


def inverse_frequencies(config: KVCacheConfig) -> tuple[np.ndarray, float]:
    """Frequencies of the rotary pairs and the factor on cosine and sine.

    Parameters
    ----------
    config : KVCacheConfig
        ``rope_theta``, ``rope_scaling``, ``rotary_dim`` and the two lengths are read.

    Returns
    -------
    tuple of (float32 array [rotary / 2], float)
        Radians per position, and the attention factor of yarn and longrope (else 1).

    Raises
    ------
    ModelError
        For an unknown rule, or a rule whose parameters are missing.
    """
    rules = {
        "default": _default,
        "linear": _linear,
        "dynamic": _dynamic,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }
    name = rope_type(config)
    if name not in rules:
        raise ModelError(f"rope_scaling type {name!r} is not supported: expected {_SUPPORTED}")
    try:
        inv_freq, factor = rules[name](config, dict(config.rope_scaling or {}))
    except KeyError as e:
        raise ModelError(f"rope_scaling of type {name!r} lacks the field {e}") from None
    return np.asarray(inv_freq, np.float32), float(factor)


def _powers(config: KVCacheConfig) -> np.ndarray:
    exponent = np.arange(0, config.rotary, 2, dtype=np.float32) / np.float32(config.rotary)
    return np.power(float(config.rope_theta), exponent.astype(np.float64)).astype(np.float32)


def _base(config: KVCacheConfig) -> np.ndarray:
    return np.float32(1.0) / _powers(config)


def _default(config: KVCacheConfig, scaling: Mapping[str, Any]):
    return _base(config), 1.0


def _linear(config: KVCacheConfig, scaling: Mapping[str, Any]):
    return _base(config) / np.float32(scaling["factor"]), 1.0


def _dynamic(config: KVCacheConfig, scaling: Mapping[str, Any]):
    """Up to the trained length, dynamic NTK scaling is the plain embedding."""
    trained = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if not trained or not config.context_length or config.context_length > trained:
        raise ModelError(
            f"dynamic rope_scaling changes the frequencies beyond {trained} positions, which a "
            f"KV cache cannot follow; the context length is {config.context_length}: choose at "
            "most the trained length"
        )
    return _base(config), 1.0


def _llama3(config: KVCacheConfig, scaling: Mapping[str, Any]):
    factor = np.float32(scaling["factor"])
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained = scaling["original_max_position_embeddings"]
    inv_freq = _base(config)
    wavelength = np.float32(2 * math.pi) / inv_freq
    scaled = np.where(wavelength > trained / low, inv_freq / factor, inv_freq)
    smooth = (np.float32(trained) / wavelength - np.float32(low)) / np.float32(high - low)
    smoothed = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    medium = (wavelength >= trained / high) & (wavelength <= trained / low)
    return np.where(medium, smoothed, scaled), 1.0


def _yarn(config: KVCacheConfig, scaling: Mapping[str, Any]):
    dim, base, factor = config.rotary, float(config.rope_theta), scaling["factor"]
    trained = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if not trained:
        raise KeyError("original_max_position_embeddings")

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            attention = mscale(factor, scaling["mscale"]) / mscale(
                factor, scaling["mscale_all_dim"]
            )
        else:
            attention = mscale(factor)

    def correction(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = correction(scaling.get("beta_fast") or 32)
    high = correction(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    extrapolation = np.float32(1) - ramp.astype(np.float32)
    inv_freq = _base(config)
    interpolated = np.float32(1) / (np.float32(factor) * _powers(config))
    return interpolated * (1 - extrapolation) + inv_freq * extrapolation, attention


def _longrope(config: KVCacheConfig, scaling: Mapping[str, Any]):
    """Short factors within the trained length, long ones where the context is longer."""
    trained = scaling.get("original_max_position_embeddings")
    longest = config.max_position_embeddings
    factor = scaling.get("factor")
    if trained and longest:
        factor = longest / trained
    trained = trained or longest
    if not trained:
        raise KeyError("original_max_position_embeddings")
    attention = scaling.get("attention_factor")
    if attention is None:
        factor = factor or 1.0
        attention = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    context = config.context_length or longest or trained
    name = "long_factor" if context > trained else "short_factor"
    factors = np.asarray(scaling[name], np.float32)
    if factors.shape != (config.rotary // 2,):
        raise ModelError(
            f"rope_scaling {name} has {factors.size} values, expected {config.rotary // 2}"
        )
    return np.float32(1.0) / (factors * _powers(config)), attention
