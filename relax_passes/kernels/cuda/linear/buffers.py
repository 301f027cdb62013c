"""Arguments of a CUDA linear: the order every kernel and caller agrees on.

    x [m, K] float16, [x_codes [m, K], x_scales [m]], codes, [scales], [tile_scale], [table],
    [bias [N]], [residual [m, Nout]], [source [m]], [bounds [experts + 1], or scores],
    y [m, Nout] float16

Weights are in layout "cuda-fragment" (amx_tvm/formats/cuda_layout.py); those of a linear whose
activations are E4M3, with the bytes of x and the table, in "cuda-fragment-e4m3". bias is float32,
as on CPUs.
Of a mixture's linear (experts.py) a block has the weights of one expert and the rows from a first
on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from amx_tvm.formats import e4m3
from amx_tvm.formats.cuda_layout import FragmentShape, shape_of
from relax_passes.activation import Scheme
from relax_passes.spec import LinearSpec

from ..intrinsics.decode import FragmentDecode, decode_of

_NAMES = (
    "x",
    "codes",
    "scales",
    "tile_scale",
    "bias",
    "residual",
    "source",
    "bounds",
    "y",
    "x_codes",
    "x_scales",
    "table",
)


@dataclass(frozen=True)
class Chosen:
    """Experts that a block has chosen for the only row, and their shares, in shared memory."""

    shared: tirx.Buffer
    place: int
    count: int

    def expert(self, j: tirx.Expr | int) -> tirx.Expr:
        """Return the number of the j-th best."""
        return tirx.reinterpret("int32", self.shared[self.place + j])

    def share(self, j: tirx.Expr | int) -> tirx.Expr:
        """Return its share, float32."""
        return self.shared[self.place + self.count + j]


@dataclass(frozen=True)
class Linear:
    """A linear under construction: its sizes, its format's text and its buffers in the IR."""

    spec: LinearSpec
    decode: FragmentDecode
    m: tirx.Expr | int
    x: tirx.Buffer
    codes: tirx.Buffer
    scales: tirx.Buffer | None
    tile_scale: tirx.Buffer | None
    bias: tirx.Buffer | None
    residual: tirx.Buffer | None
    source: tirx.Buffer | None
    bounds: tirx.Buffer | None
    y: tirx.Buffer
    x_codes: tirx.Buffer | None
    x_scales: tirx.Buffer | None
    table: tirx.Buffer | None
    expert: tirx.Expr | None = None
    first: tirx.Expr | None = None
    chosen: Chosen | None = None

    @property
    def tiles(self) -> int:
        """Row tiles of 16, of one expert where there are several."""
        return self.decode.shape.tiles(self.spec.n)

    @property
    def units(self) -> int:
        """Column units, see cuda_layout, of all experts where they are joined."""
        return self.decode.shape.units(self.spec.k) * self._joined

    @property
    def columns(self) -> int:
        """Columns that are summed over."""
        return self.spec.k * self._joined

    @property
    def _joined(self) -> int:
        return self.spec.chosen if self.spec.joined else 1

    def with_rows(self, m: tirx.Expr | int) -> Linear:
        """Same linear with another expression for the number of rows of x."""
        return replace(self, m=m)

    def tile(self, index: tirx.Expr) -> tirx.Expr:
        """Place of a row tile among all in the packed arrays."""
        return index if self.expert is None else self.expert * self.tiles + index

    def place(self, tile: tirx.Expr, unit: tirx.Expr) -> tuple[tirx.Expr, tirx.Expr]:
        """Place of a row tile and a column unit in the packed arrays."""
        if not self.spec.joined or self.chosen is None:
            return self.tile(tile), unit
        each = tirx.const(self.units // self._joined, "int32")
        j = tirx.truncdiv(unit, each)
        return self.chosen.expert(j) * self.tiles + tile, unit - j * each

    def feature(self, index: tirx.Expr) -> tirx.Expr:
        """Place of a row of W in the bias."""
        return index if self.expert is None else self.expert * self.spec.n + index

    def y_row(self, row: tirx.Expr) -> tirx.Expr:
        """Row of y, and of the residual, of a block's row."""
        return row if self.first is None else self.first + row

    def x_row(self, row: tirx.Expr) -> tirx.Expr:
        """Row of x of a block's row."""
        row = self.y_row(row)
        if self.spec.gathered and (self.spec.listed or self.spec.chosen):
            return tirx.truncdiv(row, tirx.const(self.spec.gathered, "int32"))
        return row if self.source is None else self.source[row]


def format_of(spec: LinearSpec):  # noqa: ANN201 - amx_tvm.formats.Format
    """Registry entry of the weight format; None for "none" (float16 fragments)."""
    return None if spec.format in ("none", "float16") else spec.fmt


def in_e4m3(spec: LinearSpec) -> bool:
    """Whether kernels for many rows multiply E4M3."""
    return spec.activation.scheme is Scheme.E4M3


def layout_of(spec: LinearSpec) -> str:
    """Name of the packed layout of a linear's weights."""
    return e4m3.LAYOUT if in_e4m3(spec) else "cuda-fragment"


def fragment_shape(spec: LinearSpec) -> FragmentShape:
    """Sizes of the packed weights."""
    return shape_of(format_of(spec), in_e4m3(spec))


def argument_shapes(spec: LinearSpec) -> list[tuple[str, tuple, str]]:
    """List (name, shape, dtype) of all arguments in order; a leading None is m."""
    found = spec.buffers(layout_of(spec))
    return [(name.removeprefix("w_"), shape, dtype) for name, shape, dtype in found]


def declare(spec: LinearSpec) -> Linear:
    """Declare the arguments in the PrimFunc being built."""
    # Relax counts in int64; kernels count rows in int32
    m = tirx.Var("m", "int64") if spec.m is None else spec.m
    rows = m
    if spec.gathered:
        rows = m // spec.gathered if isinstance(m, int) else m
        m = m if isinstance(m, int) else m * spec.gathered
    if spec.joined:
        rows = spec.chosen
    made: dict[str, tirx.Buffer] = {}
    for name, shape, dtype in argument_shapes(spec):
        extent = rows if name.startswith("x") else m
        concrete = tuple(extent if size is None else size for size in shape)
        made[name] = T.arg(name, T.Buffer(concrete, dtype))
    return Linear(
        spec,
        decode_of(format_of(spec), in_e4m3(spec)),
        m if isinstance(m, int) else tirx.Cast("int32", m),
        *(made.get(n) for n in _NAMES),
    )
