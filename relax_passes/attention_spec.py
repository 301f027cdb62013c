"""What attention of one layer computes, in numbers: what models ask for and kernels are made for.

A rotary embedding is its frequencies, one a pair of channels: where they come from is the model's
business (``amx_tvm.models.rope``), how they are applied a kernel's.
"""

from __future__ import annotations

from dataclasses import dataclass


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
