"""Sizes of a cache of few bits, alike on all targets: only the order of what they count differs.

Pages hold 64 tokens of all layers, so that a fork copies one row. A block is one layer's keys and
values of one head. Beside the pages each sequence has a place for its tokens in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from amx_tvm import formats
from amx_tvm.formats import Format
from amx_tvm.formats.four_over_six import four_over_six
from relax_passes.cache_spec import GROUP, CacheSpec

PAGE = 64  # tokens
PANEL = 16  # tokens whose keys lie together
FIELDS = 8  # numbers that a step is told of a sequence


@dataclass(frozen=True)
class Sizes:
    """The sizes, in bytes.

    Parameters
    ----------
    spec : CacheSpec
        How keys and values are rounded.
    layers, kv_heads, head_dim : int
        Of the model.
    """

    spec: CacheSpec
    layers: int
    kv_heads: int
    head_dim: int

    @cached_property
    def format(self) -> Format:
        """The number format, as it rounds."""
        found = formats.get(self.spec.format)
        better = self.spec.four_over_six and found.rule is not None
        return four_over_six(found) if better else found

    @property
    def groups(self) -> int:
        """Groups of 32 channels of a head."""
        return self.head_dim // GROUP

    @property
    def codes(self) -> int:
        """Bytes of a token's codes in a group."""
        return GROUP * self.format.code_bits // 8

    @property
    def subgroups(self) -> int:
        """Scale groups in 32 channels."""
        return GROUP // self.format.group_size

    @property
    def scale_bytes(self) -> int:
        """Bytes of one scale."""
        return self.format.scale_tensors[0].bytes

    @property
    def parts(self) -> int:
        """Scales of a token in a group of 32 channels: scale tensors, then groups of channels."""
        return len(self.format.scale_tensors) * self.subgroups

    @property
    def panel(self) -> int:
        """Bytes of the keys of 16 tokens."""
        return PANEL * self.groups * (self.codes + self.parts * self.scale_bytes)

    @property
    def keys(self) -> int:
        """Bytes of a block's keys, and of its values."""
        return PAGE // PANEL * self.panel

    @property
    def mean(self) -> int:
        """Bytes of the mean that a block's keys are stored less, to a multiple of 64."""
        size = self.groups * (self.codes + self.parts * self.scale_bytes)
        return -(-size // 64) * 64 if self.spec.centred else 0

    @property
    def block(self) -> int:
        """Bytes of a block."""
        return 2 * self.keys + self.mean

    @property
    def recent(self) -> int:
        """float16 numbers of a sequence in a layer and head."""
        return 2 * self.spec.recent * self.head_dim

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of all layers."""
        return self.layers * self.kv_heads * self.block

    @property
    def sequence_bytes(self) -> int:
        """Bytes of a sequence's tokens in 16 bits."""
        return 2 * self.layers * self.kv_heads * self.recent
