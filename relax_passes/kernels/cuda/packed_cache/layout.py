"""Where rounded keys and values lie on a GPU, and what a step is told of its sequences.

Pages hold 64 tokens of all layers, so that a fork copies one row. A block is one layer's keys and
values of one head, contiguous, in panels of 16 tokens, which a warp reads from front to back:

    pages    uint8 [pages][layers][kv_heads][4 panels]
    panel    codes of keys     [16 tokens][4][groups] words: the channels 8t .. 8t+7 of each group
             scales of keys    [16 tokens][d / 16] bytes
             codes of values   [16 tokens][8][d / 64] words: channels 8g .. 8g+7 of each 64
             scales of values  [16 tokens][d / 16] bytes
    recent   float16 [sequences][layers][kv_heads]: the tokens in 16 bits. Token t lies in slot
             t mod newest, one of the first also in a slot of its own
             keys    [newest][d]
             values  [newest / 16][d][16]   slots 2t, 2t+1, 2t+8, 2t+9 of 16 lie together
             keys    [first][d]
             values  [d][first]

A word is eight channels, two where codes have eight bits (codes_text). Scales are those of a token
in the order of its channels, for each group one for the positive and one for the negative values
where a format has both.

A step is told, in one tensor that the runtime writes (``amx_tvm/runtime/kv_device.py``):

    header     int32 [16]        sequences, rows, where rows begin, and where `rounded` does
    sequences  int32 [n, 8]      first row, rows, tokens before, nothing (kernels note here from
                                 which token on tokens are in 16 bits), place in `recent`, and where
                                 its pages begin
    rows       int32 [2, rows]   each row's position, and its sequence (of the step)
    pages      int32             those of all sequences
    rounded    int32 [places]    the kernels' own, at the end: how many tokens of a place's sequence
                                 have been rounded to pages; a pass that fails leaves it right
"""

from __future__ import annotations

from amx_tvm.errors import ModelError
from relax_passes.attention_spec import AttentionSpec
from relax_passes.cache_spec import CacheSpec
from relax_passes.kernels.cache_sizes import FIELDS, PAGE, PANEL, Sizes

HEADER = 16  # numbers in front of what a step is told
CHANNELS = 64  # of which a head has a multiple
MOST_CHANNELS = 256
FIRST = 4  # tokens at the beginning that kernels can read in 16 bits


class Layout(Sizes):
    """Sizes of a cache, and the names that kernels have for them."""

    @property
    def turn(self) -> int:
        """Size of the Hadamard matrix; 0 for none."""
        return self.head_dim & -self.head_dim if self.spec.turned else 0

    @property
    def kind(self) -> str:
        """The C++ type that decodes the format (codes_text)."""
        if self.format.code_bits == 8:
            return "AmxEightBits"
        scales = self.format.scale_tensors
        pair = "Pair" if len(scales) == 2 else "One"
        return f"Amx{pair}{scales[0].type.name}"

    @property
    def panel_bytes(self) -> int:
        """Bytes of 16 tokens of a layer and head."""
        return self.page_bytes // (PAGE // PANEL * self.layers * self.kv_heads)

    @property
    def numbers(self) -> str:
        """Template arguments: format, channels, tokens in 16 bits, matrix."""
        spec = self.spec
        return f"{self.kind}, {self.head_dim}, {spec.newest}, {spec.first}, {self.turn}"

    @property
    def name(self) -> str:
        """The same in a C name."""
        return self.numbers.replace(", ", "_")

    @property
    def place(self) -> str:
        """Template arguments of where a layer's blocks lie: layers and kv heads."""
        return f"{self.layers}, {self.kv_heads}"


def check(spec: CacheSpec, head_dim: int) -> None:
    """Refuse heads and choices that no kernel of GPUs knows.

    Raises
    ------
    ModelError
        With the sizes.
    """
    if head_dim % CHANNELS or head_dim > MOST_CHANNELS:
        raise ModelError(
            f"heads of {head_dim} channels cannot be kept as {spec.format} on GPUs: kernels know "
            f"multiples of {CHANNELS} up to {MOST_CHANNELS}; leave kv_cache out"
        )
    if spec.newest % PANEL or spec.first not in (0, FIRST):
        raise ModelError(
            f"{spec.newest} newest and {spec.first} first tokens in 16 bits have no kernels on "
            f"GPUs: expected a multiple of {PANEL}, and {FIRST} or none"
        )


def layout_of(spec: CacheSpec, specs: tuple[AttentionSpec, ...]) -> Layout:
    """Return the layout of a model's cache; `check`'s errors."""
    check(spec, specs[0].head_dim)
    return Layout(spec, len(specs), specs[0].kv_heads, specs[0].head_dim)


__all__ = ["CHANNELS", "FIELDS", "HEADER", "PAGE", "PANEL", "Layout", "check", "layout_of"]
