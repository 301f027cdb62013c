"""Eight-bit weights as 16-bit words, for vectors of eight rows that add products of 16-bit pairs.

A row's lane of a packed vector is the bytes q + 128 of four columns.  Their words are two vectors,
those of the even columns and those of the odd ones: the order of pair_words.ORDER.
"""

from __future__ import annotations

from typing import Any

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx2 import Avx2
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

from .pair_words import LOW_STEPS_BITS

OFFSET = 128  # of a byte


def supports(spec: LinearSpec, isa: Any) -> bool:
    """Whether a linear's weights are such bytes, and words the best form of them."""
    if not isinstance(isa, Avx2) or not isa.word_panels or not spec.activation.integer:
        return False
    if spec.format == "none" or spec.fmt.group_size != GROUP or len(spec.fmt.terms) != 1:
        return False
    (term,) = spec.fmt.terms
    return term.table is None and term.offset == OFFSET and term.factor == 1.0


class ByteWords:
    """Emits the decode of one tile and group; the interface of ``PairWords``."""

    factor = 1.0

    def __init__(self, spec: LinearSpec, isa: Avx2, buffers: Any):
        self.isa, self.term = isa, spec.fmt.terms[0]
        self.reader = ScaleReader(spec.fmt, buffers["w_scales"])

    def scales(self, tile: Expr, group: Expr) -> list[tuple[None, Expr]]:
        """Return (nothing, units float32 of eight) of the two halves of a tile's rows."""
        lanes = self.isa.rows
        step = e.const(2.0**-LOW_STEPS_BITS, "float32", lanes)
        units = [
            self.reader.scale(self.term.scale, tile, group, 0, first, lanes) * step
            for first in range(0, TILE_ROWS, lanes)
        ]
        return [(None, e.let(unit)) for unit in units]

    def words(self, packed: Expr, _factors: Expr | None) -> list[Expr]:
        """Decode a packed vector: int16 of 16, of its even columns and of its odd ones."""
        lanes = 2 * self.isa.rows
        byte = e.const(8, "int16", lanes)
        signed = e.let(packed ^ e.const(OFFSET, "uint8", 2 * lanes))
        pairs = e.let(e.bits(signed, "int16", lanes))
        return [e.let((pairs << byte) >> byte), e.let(pairs >> byte)]
