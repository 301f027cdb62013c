"""AVX-512 with VNNI and VBMI: vpermb looks up 64 codes, vpdpbusd multiplies 64 bytes.

vpermb reads six index bits.  With the 16-entry table repeated four times the upper two bits do not
matter, so low nibbles need no mask and high ones only a shift of whole words.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx

from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr

from .base import Isa, byte_vector


class Avx512(Isa):
    """512-bit vectors: one vector is the 16 rows of a tile."""

    name = "avx512"
    rows = 16
    block: Sequence[int] = (8, 4, 2, 1)
    decoded_panel_rows = 16
    doc = "AVX-512 VNNI+VBMI: vpermb tables, vpdpbusd"

    def __init__(self, bf16: bool = False):
        self.bf16 = bf16

    def on(self, target: TargetInfo) -> Avx512:
        """Use bf16 dot products where the target has them."""
        return Avx512(target.has("avx512bf16"))

    def low(self, packed: Expr) -> Expr:
        """Leave the byte as it is: vpermb ignores the upper bits."""
        return packed

    def high(self, packed: Expr) -> Expr:
        """Shift 32-bit words by four; the bits that cross bytes land where vpermb ignores them."""
        words = e.bits(packed, "uint32", 16) >> e.const(4, "uint32", 16)
        return e.bits(words, "uint8", 64)

    def table(self, values: tuple[int, ...]) -> Expr:
        """Repeat the table four times in a register."""
        return e.let(byte_vector(list(values) * 4))

    def lookup(self, table: Expr, index: Expr) -> Expr:
        """Look up 64 bytes with vpermb."""
        return _bytes(e.llvm("int8x64", "llvm.x86.avx512.permvar.qi.512", _i8(table), _i8(index)))

    def lookup_128(self, low: Expr, high: Expr, index: Expr) -> Expr:
        """Look up 64 bytes in a table of 128 with vpermi2b, which reads seven index bits."""
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        return _bytes(e.llvm("int8x64", name, _i8(low), _i8(index), _i8(high)))

    def repeat_bytes(self, lanes: Expr) -> Expr:
        """Repeat the low byte of every 32-bit lane in all four (vpshufb)."""
        order = byte_vector([4 * (i // 4) for i in range(16)] * 4)
        name = "llvm.x86.avx512.pshuf.b.512"
        return _bytes(e.llvm("int8x64", name, _i8(lanes), _i8(order)))

    def activation(self, codes: object, row: Expr, column: Expr) -> Expr:
        """Broadcast four int8 to every lane (a memory operand of vpdpbusd)."""
        word = e.bits(e.load(codes, row, column, lanes=4), "int32")
        return e.let(e.bits(e.splat(word, 16), "int8", 64))

    def prepare(self, weights: Expr) -> Expr:
        """Take the bytes as they are."""
        return weights

    def dot(self, acc: Expr, weights: Expr, activation: Expr) -> Expr:
        """Unsigned weights times signed activations, without saturation."""
        name = "llvm.x86.avx512.vpdpbusd.512"
        return e.llvm("int32x16", name, acc, _i8(weights), activation)

    def float_table(self, values: tuple[int, ...]) -> Expr:
        """Hold the 16 values as float32 for vpermps."""
        items = [tirx.const(float(v), "float32") for v in values]
        return e.let(tirx.Shuffle(items, [tirx.const(i, "int32") for i in range(16)]))

    def float_columns(self, packed: Expr, tables: Sequence, eight_bit: bool) -> list[list[Expr]]:
        """Look up float32 values with vpermps, which reads four index bits of each lane.

        A 32-bit lane holds the codes of row r as j=0 low, j=0 high, j=1 low, ...; column j of the
        low half is at bit 8j, of the high half at bit 8j + 4.
        """
        if eight_bit:
            return super().float_columns(packed, tables, eight_bit)
        words = e.let(e.bits(packed, "int32", 16))
        columns = []
        for shift in (*range(0, 32, 8), *range(4, 32, 8)):
            index = words if shift == 0 else e.let(words >> e.const(shift, "int32", 16))
            name = "llvm.x86.avx512.permvar.sf.512"
            columns.append([e.let(e.llvm("float32x16", name, t, index)) for t in tables])
        return columns


def _i8(value: Expr) -> Expr:
    return e.bits(value, "int8", 64)


def _bytes(value: Expr) -> Expr:
    return e.bits(value, "uint8", 64)
