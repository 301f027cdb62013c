"""silu(gate) * up quantized where it is made, a group of 32 columns at a time.

    for each group of the result, shared out to the threads
        two pairs of tiles of gate and up: 32 columns of each row of x
        codes, scale, sums of the group; its largest value and its sum of squares
    all threads wait for each other
    one thread: which groups have outliers, since that depends on the whole row

So float32 values never pass from one core to another (8 rows of 1536 columns, cores without a
common cache: 15 us to quantize them row by row, 3 us for the lists).  Where a norm comes first no
group can be quantized before the row is complete.
"""

from __future__ import annotations

from typing import Any

from relax_passes.activation import Activation, Scheme
from relax_passes.kernels.chain import Quantization
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.activations import LANES, Integers, horizontal_sum
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec

from .block_notes import BlockNotes
from .x_words import XWords

PAIRS = GROUP // TILE_ROWS  # pairs of tiles that make a group


def supports(spec: LinearSpec, then: Quantization) -> bool:
    """Whether a linear's result can be quantized group by group."""
    simple = then.prologue == "none" and then.scheme.scheme is Scheme.INTEGER
    return simple and spec.silu_mul and spec.out_features % GROUP == 0


class GroupQuantizer:
    """Emits the quantization of what a linear makes.

    Parameters
    ----------
    spec : LinearSpec
        The linear that makes it.
    scheme : Activation
        Integers, maybe with outliers.
    buffers : mapping
        Where the codes, scales, sums and lists go.
    rows : int
        Rows of x at most.
    notes : BlockNotes, XWords or None
        Of the linear that reads it.
    """

    def __init__(
        self,
        spec: LinearSpec,
        scheme: Activation,
        buffers: Any,
        rows: int,
        notes: BlockNotes | XWords | None,
    ):
        self.buffers, self.k = buffers, spec.out_features
        self.groups = self.k // GROUP
        self.outliers = scheme.outliers
        self.notes = notes
        if self.outliers:
            self.largest = e.workspace((rows, self.groups), "float32")
            self.squares = e.workspace((rows, self.groups), "float32")

    def group(self, row: Expr, group: Expr, values: list[Expr]) -> None:
        """Quantize one group of a row, two vectors."""
        integers = Integers(self.buffers, row, self.k, self.outliers)
        integers.measure(group, values)
        if self.outliers:
            e.store(self.largest, e.load(self.buffers["scales"], row, group), row, group)
            squares = e.let(integers.squares[0].get() + integers.squares[1].get())
            e.store(self.squares, horizontal_sum(squares, LANES), row, group)
        integers.scales_of(group, 1)
        integers.store(group, values)
        if self.notes is not None:
            self.notes.start(row, group)

    def list(self, m: Expr) -> None:
        """List the groups with outliers of all rows; one thread does."""
        if not self.outliers:
            return
        with e.serial(0, m) as row:
            total = e.Register("float32", LANES, e.const(0.0, "float32", LANES))
            whole = self.groups // LANES
            if whole:
                with e.serial(0, whole) as i:
                    total.set(total.get() + e.load(self.squares, row, i * LANES, lanes=LANES))
            rest = e.Register("float32", 1, horizontal_sum(total.get(), LANES))
            for i in range(whole * LANES, self.groups):
                rest.set(rest.get() + e.load(self.squares, row, i))
            Integers(self.buffers, row, self.k, False).list_outliers(rest.get(), self.largest)
