"""Which linear gets which format: the one question the passes ask of a user's configuration.

The passes see only this protocol, so they work with any configuration object that answers it; the
project's own is ``amx_tvm.config.QuantizationConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from relax_passes.activation import FLOAT32, Activation


@dataclass(frozen=True)
class LinearPolicy:
    """How one linear is quantized: weight format ("none" leaves it) and activations."""

    format: str = "none"
    activation: Activation = FLOAT32


class Policy(Protocol):
    """Answers for a weight by its name."""

    def linear(self, name: str) -> LinearPolicy:
        """Return the policy of the linear whose weight has this name."""
        ...

    def table(self, name: str) -> str:
        """Return the format of an embedding table (and of a head tied to it)."""
        ...
