"""What a kernel needs from an instruction set, and the version that every LLVM target has.

A packed vector holds ``rows`` rows of a tile; each row is a 32-bit lane of four bytes, the values
of four neighbouring columns.  ``Isa`` decodes four-bit codes into such bytes by table and
multiplies them with four activation bytes, adding the four products to the row's int32 lane.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from tvm import tirx

from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.terms import Term

E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)  # magnitudes of E2M1 times two


class PairSums(ABC):
    """Sums in 16 bits, of an instruction set that adds products of bytes in pairs."""

    @abstractmethod
    def scope(self) -> Any:
        """Open what a function needs around it to call ``add``."""

    @abstractmethod
    def dots(self, largest: int) -> int:
        """Count the dots of weights up to ``largest`` with activations of -128 to 127 that fit."""

    @abstractmethod
    def add(self, total: Expr, weights: Expr, activation: Expr) -> Expr:
        """Add the products of four columns to the two 16-bit lanes of each row."""

    @abstractmethod
    def widen(self, total: Expr) -> Expr:
        """Add the two 16-bit lanes of each row, in int32."""


class Isa:
    """Plain vector arithmetic; LLVM splits the vectors to whatever the target has.

    Attributes
    ----------
    rows : int
        Rows of a tile in one vector: 16, 8 or 4 (bytes = 4 * rows).
    block : tuple of int
        Row-block sizes for M > 1, largest first; the last one is 1.
    pairs : PairSums or None
        Sums in 16 bits, where they pay.
    """

    name = "plain"
    rows = 16
    block: Sequence[int] = (4, 1)
    panel_rows = 32  # rows of x from which on panels pay, where no knob says otherwise
    decoded_panel_rows = 32  # the same for int8 x where W has to be decoded
    bf16 = False  # whether bf16 dot products exist
    pairs: PairSums | None = None
    joined_signs = False  # whether four-bit x of two signs is read as integers (fp4_integers.py)
    doc = "vectorized TensorIR for any LLVM target"

    def on(self, target: TargetInfo) -> Isa:
        """Return the variant for a target that has the rule's features and perhaps more."""
        return self

    @property
    def bytes(self) -> int:
        """Bytes of a packed vector."""
        return 4 * self.rows

    @property
    def parts(self) -> int:
        """Vectors that make up the 16 rows of a tile."""
        return 16 // self.rows

    def adapt(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Change a format's terms to what this instruction set computes."""
        return terms

    def eight_bit(self, packed: Expr) -> Expr:
        """Prepare a vector of eight-bit codes (unsigned bytes) for ``dot``."""
        return packed

    def low(self, packed: Expr) -> Expr:
        """Return the low nibble of each byte as a table index."""
        return packed & e.const(15, "uint8", self.bytes)

    def high(self, packed: Expr) -> Expr:
        """Return the high nibble of each byte as a table index."""
        return packed >> e.const(4, "uint8", self.bytes)

    def table(self, values: tuple[int, ...]) -> Expr | tuple[int, ...]:
        """Prepare a table of 16 small unsigned bytes outside the loops."""
        return values

    def lookup(self, table: Expr | tuple[int, ...], index: Expr) -> Expr:
        """Look up each index in a prepared table.

        There is no portable table instruction: the tables in use (a plain number, an E2M1
        magnitude of one sign, an E2M1 value with an offset) are computed; others are selected.
        """
        lanes = self.bytes

        def c(v: int) -> Expr:
            return e.const(v, "uint8", lanes)

        if table == tuple(range(16)):
            return index
        offset = table[0]
        signed = tuple(v - offset for v in table)
        if signed in (_E2M1_POSITIVE, _E2M1_NEGATIVE, _E2M1_SIGNED):
            code = e.let(index & c(7))
            exponent = e.let(code >> c(1))
            normal = ((code & c(1)) + c(2)) << (tirx.max(exponent, c(1)) - c(1))
            magnitude = e.let(tirx.Select(exponent == c(0), code, normal))
            negative = index >= c(8)
            if signed == _E2M1_POSITIVE:
                return tirx.Select(negative, c(0), magnitude)
            if signed == _E2M1_NEGATIVE:
                return tirx.Select(negative, magnitude, c(0))
            return tirx.Select(negative, c(offset) - magnitude, c(offset) + magnitude)
        value = c(table[15])
        for code in range(14, -1, -1):
            value = tirx.Select(index == c(code), c(table[code]), value)
        return value

    def activation(self, codes: object, row: Expr, column: Expr) -> Expr:
        """Load four int8 activations in the form that ``dot`` takes."""
        return e.let(e.load(codes, row, column, lanes=4))

    def prepare(self, weights: Expr) -> Any:
        """Bring a vector of unsigned bytes into the form that ``dot`` takes, for several dots."""
        lane = e.let(e.bits(weights, "int32", self.rows))
        byte = e.const(255, "int32", self.rows)
        return [
            e.let((lane >> e.const(8 * j, "int32", self.rows) if j else lane) & byte)
            for j in range(4)
        ]

    def dot(self, acc: Expr, weights: Any, activation: Expr) -> Expr:
        """Add to each int32 lane the sum of its four bytes times the four activations."""
        for j in range(4):
            a = e.cast(tirx.Shuffle([activation], [tirx.const(j, "int32")]), "int32")
            acc = acc + weights[j] * e.splat(a, self.rows)
        return acc

    def words_scope(self) -> Any:
        """Open what a function needs around it to add products of 16-bit words (``words_dot``)."""
        return nullcontext()

    # float32 arithmetic: a four-bit code becomes a float32 lane

    def float_table(self, values: tuple[int, ...]) -> Expr | tuple[int, ...]:
        """Prepare a table of 16 integers for ``float_lookup``."""
        return self.table(values)

    def float_columns(self, packed: Expr, tables: Sequence, eight_bit: bool) -> list[list[Expr]]:
        """Decode a packed vector to float32 vectors, [column in storage order][table].

        Four-bit vectors hold eight columns: j = 0..3 in the low nibbles, then 4..7 in the high
        ones.  Eight-bit vectors hold four.
        """
        halves = [packed] if eight_bit else [self.low(packed), self.high(packed)]
        columns: list[list[Expr]] = []
        for half in halves:
            half = e.let(half)
            looked = [half if t is None else e.let(self.lookup(t, half)) for t in tables]
            lanes = [e.let(e.bits(v, "int32", self.rows)) for v in looked]
            for j in range(4):
                columns.append([self._byte_to_float(v, j) for v in lanes])
        return columns

    def _byte_to_float(self, lanes: Expr, j: int) -> Expr:
        byte = lanes if j == 0 else lanes >> e.const(8 * j, "int32", self.rows)
        return e.let(e.cast(byte & e.const(255, "int32", self.rows), "float32", self.rows))


_E2M1_POSITIVE = E2M1_DOUBLED + (0,) * 8
_E2M1_NEGATIVE = (0,) * 8 + E2M1_DOUBLED
_E2M1_SIGNED = E2M1_DOUBLED + tuple(-v for v in E2M1_DOUBLED)


def byte_vector(values: Sequence[int]) -> Expr:
    """Build a constant vector of bytes out of 32-bit words."""
    data = bytes(values)
    words = [
        tirx.const(int.from_bytes(data[i : i + 4], "little", signed=True), "int32")
        for i in range(0, len(data), 4)
    ]
    vector = tirx.Shuffle(words, [tirx.const(i, "int32") for i in range(len(words))])
    return e.bits(vector, "uint8", len(data))
