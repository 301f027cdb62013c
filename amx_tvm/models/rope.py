"""Rotary position embeddings: the frequencies of a Hugging Face ``rope_scaling``.

This is the one description of them: models, calibration and the attention kernels take what
`rotation` returns. Only NumPy is needed.

The arithmetic follows transformers' ``modeling_rope_utils`` in float32, with powers rounded from
float64: positions up to 131072 multiply every unit in the last place of a frequency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from amx_tvm.errors import ModelError
from amx_tvm.models.config import DecoderConfig, Rope
from relax_passes.attention_spec import Rotation


def rotation(config: DecoderConfig, layer: int, tokens: int | None = None) -> Rotation:
    """Return the rotary embedding of a layer; one without frequencies where nothing rotates.

    ``tokens`` is the length of the sequence, for longrope, which decides by it; without it, the
    table for short sequences is taken where sequences of both kinds occur.
    """
    rope = config.rope(layer)
    if rope is None:
        return Rotation()
    channels = config.rotary_dim or config.head_dim
    context = tokens or config.long_after or config.context_length
    return frequencies(rope, channels, config.context_length, context)


def rope_type(rope: Rope) -> str:
    """Name of the scaling rule ("default" when there is none)."""
    return rope.scaling.get("rope_type", rope.scaling.get("type")) or "default"


def frequencies(
    rope: Rope, channels: int, trained: int | None = None, context: int | None = None
) -> Rotation:
    """Compute the frequencies of a rotary embedding.

    Parameters
    ----------
    rope : Rope
        Base and scaling.
    channels : int
        Channels of a head that rotate, an even number.
    trained, context : int or None
        The configuration's ``max_position_embeddings`` and this deployment's longest sequence, in
        tokens; longrope, yarn and dynamic scaling read them.

    Returns
    -------
    Rotation
        channels / 2 frequencies, and the attention factor of yarn and longrope (else 1).

    Raises
    ------
    ModelError
        For an unknown rule, or a rule whose parameters are missing.
    """
    name = rope_type(rope)
    if name not in _RULES:
        raise ModelError(
            f"rope_scaling type {name!r} is not supported: expected {', '.join(_RULES)}"
        )
    try:
        with np.errstate(all="ignore"):  # what is no number is refused below
            asked = _Asked(rope, channels, trained, context)
            found, factor = _RULES[name](asked, dict(rope.scaling))
    except KeyError as e:
        raise ModelError(f"rope_scaling of type {name!r} lacks the field {e}") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as e:
        raise ModelError(f"rope_scaling of type {name!r} cannot be computed: {e}") from None
    if not (np.isfinite(found).all() and np.all(np.asarray(found) > 0) and 0 < factor < math.inf):
        raise ModelError(
            f"rope_scaling of type {name!r} gives frequencies that are no positive numbers; "
            "correct its fields in the configuration"
        )
    return Rotation(tuple(float(f) for f in np.asarray(found, np.float32)), float(factor))


@dataclass(frozen=True)
class _Asked:
    """The arguments of `frequencies`, as the rules read them."""

    rope: Rope
    channels: int
    trained: int | None
    context: int | None


def _powers(asked: _Asked) -> np.ndarray:
    exponent = np.arange(0, asked.channels, 2, dtype=np.float32) / np.float32(asked.channels)
    return np.power(float(asked.rope.theta), exponent.astype(np.float64)).astype(np.float32)


def _base(asked: _Asked) -> np.ndarray:
    return np.float32(1.0) / _powers(asked)


def _default(asked: _Asked, scaling: Mapping[str, Any]):
    return _base(asked), 1.0


def _linear(asked: _Asked, scaling: Mapping[str, Any]):
    return _base(asked) / np.float32(scaling["factor"]), 1.0


def _dynamic(asked: _Asked, scaling: Mapping[str, Any]):
    """Up to the trained length, dynamic NTK scaling is the plain embedding."""
    trained = scaling.get("original_max_position_embeddings") or asked.trained
    if not trained or not asked.context or asked.context > trained:
        raise ModelError(
            f"dynamic rope_scaling changes the frequencies beyond {trained} positions, which a "
            f"KV cache cannot follow; the context length is {asked.context}: choose at "
            "most the trained length"
        )
    return _base(asked), 1.0


def _llama3(asked: _Asked, scaling: Mapping[str, Any]):
    factor = np.float32(scaling["factor"])
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained = scaling["original_max_position_embeddings"]
    inv_freq = _base(asked)
    wavelength = np.float32(2 * math.pi) / inv_freq
    scaled = np.where(wavelength > trained / low, inv_freq / factor, inv_freq)
    smooth = (np.float32(trained) / wavelength - np.float32(low)) / np.float32(high - low)
    smoothed = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    medium = (wavelength >= trained / high) & (wavelength <= trained / low)
    return np.where(medium, smoothed, scaled), 1.0


def _yarn(asked: _Asked, scaling: Mapping[str, Any]):
    dim, base, factor = asked.channels, float(asked.rope.theta), scaling["factor"]
    trained = scaling.get("original_max_position_embeddings") or asked.trained
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
    inv_freq = _base(asked)
    interpolated = np.float32(1) / (np.float32(factor) * _powers(asked))
    return interpolated * (1 - extrapolation) + inv_freq * extrapolation, attention


def _longrope(asked: _Asked, scaling: Mapping[str, Any]):
    """Short factors within the trained length, long ones where the context is longer."""
    trained = scaling.get("original_max_position_embeddings")
    longest = asked.trained
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
    context = asked.context or longest or trained
    name = "long_factor" if context > trained else "short_factor"
    factors = np.asarray(scaling[name], np.float32)
    if factors.shape != (asked.channels // 2,):
        raise ModelError(
            f"rope_scaling {name} has {factors.size} values, expected {asked.channels // 2}"
        )
    return np.float32(1.0) / (factors * _powers(asked)), attention


_RULES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
