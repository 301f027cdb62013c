"""AArch64 NEON: tbl looks up 16 codes; products by sdot where the core has it, else by smull.

A 512-bit packed vector is four quarters of four rows.  Table bytes are at most 127, so they are
signed operands as well; eight-bit weights (q + 128) become signed by flipping their top bit, which
takes their offset of 128 away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.terms import Term

from .base import Isa, byte_vector


class Neon(Isa):
    """128-bit vectors without the dot-product extension (Cortex-A53, A72)."""

    name = "neon"
    rows = 4
    block: Sequence[int] = (4, 2, 1)
    doc = "NEON: tbl tables, smull and pairwise sums"

    def adapt(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Shift the offset of eight-bit weights, which are signed here."""
        return tuple(
            replace(t, offset=int(t.offset) - 128) if t.table is None else t for t in terms
        )

    def eight_bit(self, packed: Expr) -> Expr:
        """Turn q + 128 into the signed byte q."""
        return packed ^ e.const(128, "uint8", 16)

    def table(self, values: tuple[int, ...]) -> Expr:
        """Hold the table in one register."""
        return e.let(byte_vector(list(values)))

    def lookup(self, table: Expr, index: Expr) -> Expr:
        """Look up 16 bytes with tbl."""
        name = "llvm.aarch64.neon.tbl1.v16i8"
        return e.bits(e.llvm("int8x16", name, _i8(table), _i8(index)), "uint8", 16)

    def positive(self, value: Expr) -> Expr:
        """Return the larger of signed bytes and 0."""
        zero = e.const(0, "int8", 16)
        return e.bits(
            e.llvm("int8x16", "llvm.aarch64.neon.smax.v16i8", _i8(value), zero), "uint8", 16
        )

    def shift_rounded(self, value: Expr, shift: Expr) -> Expr:
        """Shift signed bytes to the left by signed bytes: to the right they are rounded."""
        shifted = e.llvm("int8x16", "llvm.aarch64.neon.srshl.v16i8", _i8(value), _i8(shift))
        return e.bits(shifted, "uint8", 16)

    def activation(self, codes: object, row: Expr, column: Expr) -> Expr:
        """Broadcast four int8 to every lane."""
        word = e.bits(e.load(codes, row, column, lanes=4), "int32")
        return e.let(e.bits(e.splat(word, 4), "int8", 16))

    def prepare(self, weights: Expr) -> Expr:
        """Take the bytes as they are."""
        return weights

    def dot(self, acc: Expr, weights: Expr, activation: Expr) -> Expr:
        """Multiply in halves to 16 bits and add neighbours twice: 2 * 128 * 127 still fits."""
        w = e.let(_i8(weights))
        products = []
        for first in (0, 8):
            index = [tirx.const(first + i, "int32") for i in range(8)]
            low, a = tirx.Shuffle([w], index), tirx.Shuffle([activation], index)
            products.append(e.llvm("int16x8", "llvm.aarch64.neon.smull.v8i16", low, a))
        pairs = e.llvm("int16x8", "llvm.aarch64.neon.addp.v8i16", *products)
        return acc + e.llvm("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", pairs)


class NeonDot(Neon):
    """128-bit vectors with sdot (Cortex-A55 and A76 on, Apple, Neoverse)."""

    name = "neon-dotprod"
    panel_rows = 4  # decoding a panel costs what two rows of it do
    doc = "NEON with dot products: tbl tables, sdot"

    def dot(self, acc: Expr, weights: Expr, activation: Expr) -> Expr:
        """Multiply signed bytes and add four neighbours."""
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return e.llvm("int32x4", name, acc, _i8(weights), activation)

    def lane_dot(self, acc: Expr, weights: Expr, columns: Expr, lane: int) -> Expr:
        """Multiply by four of 16 columns of a row: sdot takes a lane of a register."""
        words = e.bits(columns, "int32", 4)
        four = tirx.Shuffle([words], [tirx.const(lane, "int32")] * 4)
        return self.dot(acc, weights, e.bits(four, "int8", 16))


class NeonMatrix(NeonDot):
    """128-bit vectors with smmla as well (Cortex-A510 and A710 on, Apple M2, Neoverse V1)."""

    name = "neon-i8mm"
    doc = "NEON with matrix products: tbl tables, sdot, smmla"

    def matrix_dot(self, acc: Expr, one: Expr, other: Expr) -> Expr:
        """Add the products of eight columns of two rows with two rows: [one's row, other's row]."""
        return e.llvm("int32x4", "llvm.aarch64.neon.smmla.v4i32.v16i8", acc, one, other)


def _i8(value: Expr) -> Expr:
    return e.bits(value, "int8", 16)
