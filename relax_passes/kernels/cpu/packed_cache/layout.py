"""Where rounded keys and values lie, and what a step is told of its sequences.

Pages hold 64 tokens of all layers, so that a fork copies one row. A block is one layer's keys and
values of one head, contiguous: attention reads a page of a layer from front to back.

    pages    uint8 [pages][layers][kv_heads][block]
    block    keys: 4 panels of 16 tokens, each
                 codes   [groups][tile]        a tile is "tile16x32" of amx_tvm.formats: 16 tokens
                                               are its rows, 32 channels its columns
                 scales  [groups][scale parts][16 tokens]
             values:
                 codes   [64 tokens][groups][16 or 32 bytes]   four bits: byte i holds channel i
                                               (low) and 16 + i of a group; eight: channel i
                 scales  [groups][scale parts][64 tokens]
    recent   float16 [sequences][layers][kv_heads][2 recent d]: the tokens in 16 bits. Token t lies
             in slot t mod newest, one of the first also in slot newest + t
                 keys    [d][recent]           channels in front: 16 tokens are a vector
                 values  [recent][d]

A scale part is a scale tensor's scales of a group of 16 or 32 channels, one or two bytes each.

A step is told, by tensors that the runtime makes (``amx_tvm/runtime/kv_packed.py``):

    rows       int32 [2, rows]        each row's position, and its sequence (of the step)
    sequences  int32 [sequences, 8]   first row, rows, tokens before, token from which on tokens are
                                      in 16 bits, place in `recent`, and three that say nothing
    tables     int32 [sequences, n]   the pages of each
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm.tirx.script.builder import ir as T

from amx_tvm import formats
from amx_tvm.formats import Format
from amx_tvm.formats.four_over_six import four_over_six
from relax_passes.cache_spec import GROUP, CacheSpec

PAGE = 64  # tokens
PANEL = 16  # tokens of a tile of keys
FIELDS = 8  # numbers of a sequence
ROW, ROWS, BEFORE, EXACT, PLACE = range(5)


@dataclass(frozen=True)
class Layout:
    """Sizes and offsets, in bytes.

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
    def block(self) -> int:
        """Bytes of a block."""
        return 2 * self.keys

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

    def key_codes(self, panel: Any, group: Any) -> Any:
        """Offset of a tile's codes."""
        return panel * self.panel + group * (PANEL * self.codes)

    def key_scales(self, panel: Any, group: Any, part: int) -> Any:
        """Offset of the scales of 16 tokens."""
        begin = PANEL * self.groups * self.codes
        at = (group * self.parts + part) * (PANEL * self.scale_bytes)
        return panel * self.panel + begin + at

    def value_codes(self, slot: Any, group: Any) -> Any:
        """Offset of a token's codes of values."""
        return self.keys + slot * (self.groups * self.codes) + group * self.codes

    def value_scales(self, group: Any, part: int, slot: Any = 0) -> Any:
        """Offset of the scales of values, from a token's on."""
        begin = self.keys + PAGE * self.groups * self.codes
        at = (group * self.parts + part) * (PAGE * self.scale_bytes)
        return begin + at + slot * self.scale_bytes


class Step:
    """The buffers of a cache and of what a step is told, as arguments of a kernel.

    Parameters
    ----------
    layout : Layout
        What they hold.
    handles : dict
        Handles of the arguments, by name.
    """

    NAMES = ("rows", "sequences", "tables", "pages", "recent")

    def __init__(self, layout: Layout, handles: dict[str, Any]) -> None:
        n, count, most = T.int32(), T.int32(), T.int32()
        pages, places = T.int64(), T.int64()
        heads = (layout.layers, layout.kv_heads)
        self.n, self.count, self.most = n, count, most
        self.rows = T.match_buffer(handles["rows"], (2, n), "int32")
        self.sequences = T.match_buffer(handles["sequences"], (count, FIELDS), "int32")
        self.tables = T.match_buffer(handles["tables"], (count, most), "int32")
        self.pages = T.match_buffer(
            handles["pages"], (pages, *heads, layout.block), "uint8", align=64
        )
        self.recent = T.match_buffer(
            handles["recent"], (places, *heads, layout.recent), "float16", align=64
        )
