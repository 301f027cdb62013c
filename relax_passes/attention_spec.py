"""What attention of one layer computes, in numbers: what models ask for and kernels are made for.

A rotary embedding is its frequencies, one a pair of channels: where they come from is the model's
business (``amx_tvm.models.rope``), how they are applied a kernel's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from relax_passes.cache_spec import CacheSpec


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding: channel i < pairs of a head turns with channel i + pairs.

    Parameters
    ----------
    frequencies : tuple of float
        Radians a position, float32 values, one for each pair. Without any, nothing turns.
    factor : float
        Multiplies cosine and sine.
    """

    frequencies: tuple[float, ...] = ()
    factor: float = 1.0

    @property
    def pairs(self) -> int:
        """Channels that turn with as many others."""
        return len(self.frequencies)

    @property
    def channels(self) -> int:
        """Leading channels of a head that turn; the others stay."""
        return 2 * len(self.frequencies)


NONE = Rotation()


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer: the attributes of ``amx.attention``.

    Parameters
    ----------
    layer : int
        Whose keys and values it appends to and reads.
    heads, kv_heads, head_dim : int
        Query heads, the key/value heads that they share, channels of a head.
    scale : float
        Factor on q k^T.
    window : int
        Keys that a query sees, itself included; 0 is all.
    soft_cap : float
        Bound c of c tanh(s / c) on scaled scores; 0 leaves them as they are.
    sinks : bool
        Each head has a logit, an argument of the operator, that takes part in its softmax and adds
        nothing.
    norm_eps : float
        Each head's queries and keys are divided by the root of their mean square plus this and
        multiplied by a weight, an argument of the operator, before they turn; 0 leaves them.
    rotation : Rotation
        What turns queries and keys.
    long_rotation : Rotation
        What turns those of long sequences instead; which rows these are is an argument of the
        operator then.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    norm_eps: float = 0.0
    rotation: Rotation = NONE
    long_rotation: Rotation = NONE

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of an operator: numbers and lists of them."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _ROTATIONS}
        kept["sinks"] = int(self.sinks)
        for name in _ROTATIONS:
            turn = getattr(self, name)
            kept |= {name: list(turn.frequencies), f"{name}_factor": turn.factor}
        return kept

    @staticmethod
    def of(attributes: Mapping[str, Any]) -> AttentionSpec:
        """Read what `attributes` returned."""
        kinds: dict[str, Any] = {"int": int, "float": float, "bool": bool}
        values: dict[str, Any] = {}
        for name, kind in ((f.name, str(f.type)) for f in fields(AttentionSpec)):
            value = attributes[name]
            if name in _ROTATIONS:
                turns = tuple(float(f) for f in value)
                values[name] = Rotation(turns, float(attributes[f"{name}_factor"]))
            else:
                values[name] = kinds[kind](value)
        return AttentionSpec(**values)


_ROTATIONS = ("rotation", "long_rotation")


@dataclass(frozen=True)
class CacheStorage:
    """How keys and values are kept: a choice of the user's and the target's, not of the model.

    Parameters
    ----------
    dtype : str
        "float32" or "float16"; "" for the type of the hidden states.
    format : str
        4-bit format that queries, keys, attention weights and values are rounded to; "" for none.
    packed : CacheSpec, optional
        How keys and values are stored in few bits, where they are; the others say nothing then.
    """

    dtype: str = ""
    format: str = ""
    packed: CacheSpec | None = None


PLAIN = CacheStorage()


def one_rotation(specs: Iterable[AttentionSpec]) -> bool:
    """Whether all layers rotate alike, so that a cache can do it for all of them."""
    specs = list(specs)
    return len({s.rotation for s in specs}) == 1 and not any(s.long_rotation.pairs for s in specs)
