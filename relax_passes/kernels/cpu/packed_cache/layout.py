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
             mean that keys are stored less, where the cache is centred:
                 codes   [groups][16 bytes]                    as of a value
                 scales  [groups][scale parts]
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

from typing import Any

from tvm.tirx.script.builder import ir as T

from relax_passes.kernels.cache_sizes import FIELDS, PAGE, PANEL, Sizes

ROW, ROWS, BEFORE, EXACT, PLACE = range(5)


class Layout(Sizes):
    """Sizes and offsets, in bytes."""

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

    def mean_codes(self, group: Any) -> Any:
        """Offset of the codes of the keys' mean."""
        return 2 * self.keys + group * self.codes

    def mean_scale(self, group: Any, part: int) -> Any:
        """Offset of a scale of the keys' mean."""
        begin = 2 * self.keys + self.groups * self.codes
        return begin + (group * self.parts + part) * self.scale_bytes


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


__all__ = ["BEFORE", "EXACT", "FIELDS", "PAGE", "PANEL", "PLACE", "ROW", "ROWS", "Layout", "Step"]
