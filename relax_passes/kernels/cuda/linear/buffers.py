"""Arguments of a CUDA linear: the order every kernel and caller agrees on.

    x [m, K] float16, codes, [scales], [tile_scale], [bias [N]],
    [residual [m, Nout]], y [m, Nout] float16

Weights are in layout "cuda-fragment" (amx_tvm/formats/cuda_layout.py). bias is float32, as on CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from relax_passes.spec import LinearSpec

from ..intrinsics.decode import FragmentDecode, decode_of


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
    y: tirx.Buffer

    @property
    def tiles(self) -> int:
        """Row tiles of 16."""
        return self.decode.shape.tiles(self.spec.n)

    @property
    def units(self) -> int:
        """Column units, see cuda_layout."""
        return self.decode.shape.units(self.spec.k)

    def with_rows(self, m: tirx.Expr | int) -> Linear:
        """Same linear with another expression for the number of rows of x."""
        return replace(self, m=m)


def format_of(spec: LinearSpec):  # noqa: ANN201 - amx_tvm.formats.Format
    """Registry entry of the weight format; None for "none" (float16 fragments)."""
    return None if spec.format in ("none", "float16") else spec.fmt


def argument_shapes(spec: LinearSpec) -> list[tuple[str, tuple, str]]:
    """List (name, shape, dtype) of all arguments in order; a leading None is m."""
    found = spec.buffers("cuda-fragment")
    return [(name.removeprefix("w_"), shape, dtype) for name, shape, dtype in found]


def declare(spec: LinearSpec) -> Linear:
    """Declare the arguments in the PrimFunc being built."""
    # Relax counts in int64; kernels count rows in int32
    m = tirx.Var("m", "int64") if spec.m is None else spec.m
    made: dict[str, tirx.Buffer] = {}
    for name, shape, dtype in argument_shapes(spec):
        concrete = tuple(m if extent is None else extent for extent in shape)
        made[name] = T.arg(name, T.Buffer(concrete, dtype))
    return Linear(
        spec,
        decode_of(format_of(spec)),
        m if isinstance(m, int) else tirx.Cast("int32", m),
        *(made.get(n) for n in ("x", "codes", "scales", "tile_scale", "bias", "residual", "y")),
    )
