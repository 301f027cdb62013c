"""How keys and values are stored in few bits: a choice of the user's, as an object.

What is stored is rounded in groups of 32 channels of a head, after the rotary embedding. The newest
tokens of a sequence and its first ones stay in 16 bits: near keys and the first are what a model
looks at most. A Hadamard matrix over a head's channels, in front of the rounding, spreads outliers,
and factors in the weights make keys as loud as queries (``amx_tvm.compiler.balance``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from amx_tvm.errors import ModelError

FORMATS = ("int8", "amxfp4", "amxfp4-e4m3", "nvfp4")
GROUP = 32  # channels that a head's size has to be a multiple of


@dataclass(frozen=True)
class CacheSpec:
    """A cache of rounded keys and values.

    Parameters
    ----------
    format : str
        Number format of what is rounded, one of `FORMATS`. NVFP4 has no float32 scale here.
    newest : int
        Tokens of a sequence, the last ones, that are read in 16 bits.
    first : int
        Tokens at a sequence's beginning that are.
    turned : bool
        Whether a Hadamard matrix turns queries, keys and values.
    balanced : bool
        Whether keys are made as loud as their queries, channel by channel.
    centred : bool
        Whether keys of a page are rounded less a mean of near ones; kernels of CPUs alone do that.
    four_over_six : bool
        Whether a scale of E2M1 elements is the better of two (``amx_tvm.formats.four_over_six``).
    """

    format: str
    newest: int = 48
    first: int = 4
    turned: bool = True
    balanced: bool = True
    centred: bool = False
    four_over_six: bool = True

    @property
    def recent(self) -> int:
        """Tokens of a sequence that are held in 16 bits."""
        return self.newest + self.first

    def describe(self) -> dict[str, Any]:
        """Return the one JSON form."""
        return asdict(self)

    def check(self, head_dim: int) -> None:
        """Refuse heads that do not fit the groups.

        Raises
        ------
        ModelError
            With the sizes.
        """
        if head_dim % GROUP:
            raise ModelError(
                f"heads of {head_dim} channels cannot be kept as {self.format}: it rounds groups "
                f"of {GROUP} channels; leave kv_cache out"
            )
