"""AVX2: vpshufb looks up 32 codes; products by vpmaddubsw, or by vpdpbusd with AVX-VNNI.

A 512-bit packed vector is two halves of eight rows.  vpmaddubsw adds two products in 16 bits with
saturation: tables end at 24, far below the limit, and where they end at 15 (E2M1 in half units: 12)
16 bits hold all eight pairs of a group.  Eight-bit weights would saturate: their nibbles are
multiplied apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from tvm import tirx

from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr

from .base import Isa, PairSums, byte_vector

# The empty assembly keeps a sum one chain and steps apart: LLVM would make trees of each row of x
# in turn, and load (or spill) all weights of a group again for every row.
ADD_NAME, WORDS_NAME = "amx_add_pairs_256", "amx_add_words_256"
FIRST_NAME = "amx_first_words_256"
ADD_TEXT = f"""
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)

define linkonce_odr <16 x i16> @{ADD_NAME}(<16 x i16> %sum, <32 x i8> %w, <32 x i8> %x)
    alwaysinline nounwind {{
  %pairs = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %w, <32 x i8> %x)
  %more = add <16 x i16> %sum, %pairs
  %kept = call <16 x i16> asm sideeffect "", "=v,0"(<16 x i16> %more)
  ret <16 x i16> %kept
}}
"""
WORDS_TEXT = f"""
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)

define linkonce_odr <8 x i32> @{WORDS_NAME}(<8 x i32> %sum, <16 x i16> %w, <16 x i16> %x)
    alwaysinline nounwind {{
  %pairs = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %w, <16 x i16> %x)
  %more = add <8 x i32> %sum, %pairs
  %kept = call <8 x i32> asm sideeffect "", "=v,0"(<8 x i32> %more)
  ret <8 x i32> %kept
}}

define linkonce_odr <8 x i32> @{FIRST_NAME}(<16 x i16> %w, <16 x i16> %x)
    alwaysinline nounwind {{
  %pairs = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %w, <16 x i16> %x)
  %kept = call <8 x i32> asm sideeffect "", "=v,0"(<8 x i32> %pairs)
  ret <8 x i32> %kept
}}
"""


class MaddPairs(PairSums):
    """vpmaddubsw, and vpmaddwd with ones."""

    def scope(self) -> Any:
        """Define the function of ``add``."""
        return e.llvm_text(ADD_TEXT)

    def dots(self, largest: int) -> int:
        """Count what 16-bit lanes hold."""
        return (2**15 - 1) // (2 * 128 * largest)

    def add(self, total: Expr, weights: Expr, activation: Expr) -> Expr:
        """Multiply, add pairs and add those."""
        return tirx.call_extern("int16x16", ADD_NAME, total, _i8(weights), activation)

    def widen(self, total: Expr) -> Expr:
        """Add pairs."""
        return _widened(total)


class Avx2(Isa):
    """256-bit vectors without a dot-product instruction."""

    name = "avx2"
    rows = 8
    block: Sequence[int] = (4, 2, 1)
    panel_rows = 12
    word_panels = True  # faster than panels with the terms apart
    joined_signs = True
    pairs: PairSums | None = MaddPairs()
    doc = "AVX2: vpshufb tables, vpmaddubsw"

    def low(self, packed: Expr) -> Expr:
        """Mask the low nibbles: vpshufb writes zero where bit 7 is set."""
        return packed & e.const(15, "uint8", 32)

    def high(self, packed: Expr) -> Expr:
        """Shift whole words (there is no byte shift) and mask."""
        words = e.bits(packed, "uint16", 16) >> e.const(4, "uint16", 16)
        return e.bits(words, "uint8", 32) & e.const(15, "uint8", 32)

    def table(self, values: tuple[int, ...]) -> Expr:
        """Repeat the table in both 128-bit halves."""
        return e.let(byte_vector(list(values) * 2))

    def lookup(self, table: Expr, index: Expr) -> Expr:
        """Look up 32 bytes with vpshufb."""
        found = e.llvm("int8x32", "llvm.x86.avx2.pshuf.b", _i8(table), _i8(index))
        return e.bits(found, "uint8", 32)

    def activation(self, codes: object, row: Expr, column: Expr) -> Expr:
        """Broadcast four int8 to every lane."""
        word = e.bits(e.load(codes, row, column, lanes=4), "int32")
        return e.let(e.bits(e.splat(word, 8), "int8", 32))

    def eight_bit(self, packed: Expr) -> Any:
        """Split codes into nibbles, whose products fit 16 bits: (low, high)."""
        return e.let(self.low(packed)), e.let(self.high(packed))

    def prepare(self, weights: Any) -> Any:
        """Take the bytes (or nibbles) as they are."""
        return weights

    def dot(self, acc: Expr, weights: Any, activation: Expr) -> Expr:
        """Multiply unsigned weights by signed activations and add four neighbours."""
        name = "llvm.x86.avx2.pmadd.ub.sw"
        pairs = e.llvm("int16x16", name, _i8(weights), activation)
        return acc + _widened(pairs)

    def words_scope(self) -> Any:
        """Define the functions of ``words_dot`` and ``words_first``."""
        return e.llvm_text(WORDS_TEXT)

    def words_of(self, codes: Expr, factors: Expr) -> Expr:
        """Multiply unsigned bytes by signed ones and add two neighbours: int16 of 16."""
        return e.llvm("int16x16", "llvm.x86.avx2.pmadd.ub.sw", _i8(codes), factors)

    def words_dot(self, acc: Expr, weights: Expr, pair: Expr) -> Expr:
        """Add to each int32 lane its two int16 weights times two int16 activations."""
        return tirx.call_extern("int32x8", WORDS_NAME, acc, weights, pair)

    def words_first(self, weights: Expr, pair: Expr) -> Expr:
        """Return what ``words_dot`` makes of zeros, without an addition."""
        return tirx.call_extern("int32x8", FIRST_NAME, weights, pair)


class AvxVnni(Avx2):
    """256-bit vectors with vpdpbusd."""

    name = "avxvnni"
    word_panels = False  # vpdpbusd multiplies twice as many bytes
    pairs = None  # and adds in 32 bits
    doc = "AVX2 with AVX-VNNI: vpshufb tables, vpdpbusd"

    def eight_bit(self, packed: Expr) -> Expr:
        """Take unsigned bytes as they are: vpdpbusd does not saturate."""
        return packed

    def words_scope(self) -> Any:
        """Open nothing: there is an instruction."""
        return nullcontext()

    def words_dot(self, acc: Expr, weights: Expr, pair: Expr) -> Expr:
        """Multiply and add at once (vpdpwssd)."""
        return e.llvm("int32x8", "llvm.x86.avx512.vpdpwssd.256", acc, weights, pair)

    def words_first(self, weights: Expr, pair: Expr) -> Expr:
        """Multiply and add to zeros."""
        return self.words_dot(e.const(0, "int32", self.rows), weights, pair)

    def dot(self, acc: Expr, weights: Expr, activation: Expr) -> Expr:
        """Multiply unsigned weights by signed activations, without saturation."""
        name = "llvm.x86.avx512.vpdpbusd.256"
        return e.llvm("int32x8", name, acc, _i8(weights), activation)


def _i8(value: Expr) -> Expr:
    return e.bits(value, "int8", 32)


def _widened(pairs: Expr) -> Expr:
    """Add neighbouring 16-bit lanes."""
    return e.llvm("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, e.const(1, "int16", 16))
