"""What a linear kernel has to do, and the buffers it is called with.

A :class:`LinearSpec` names everything a schedule rule may depend on.  It also lists the kernel's
arguments, so that a caller and a rule can never disagree about their order:

    activation buffers, weight codes, weight scales, [tile_scale], [bias], [residual],
    [source], [bounds], y
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from amx_tvm.formats import packing
from amx_tvm.schema import Count, Size, conform
from relax_passes.activation import FLOAT32, GROUP, Activation, Buffers, Scheme
from relax_passes.terms import Term, kernel_terms

TILE_ROWS = 16  # rows of W in one packed tile
Arguments = tuple[tuple[str, tuple, str], ...]  # (name, shape, dtype) each; None in a shape is M
# What kernels call the arrays of a layout.
_WEIGHTS = {
    "codes": "w_codes",
    "scales": "w_scales",
    "dense16": "w_dense",
}


@dataclass(frozen=True)
class Rows:
    """The rows of x that a kernel is for: exactly ``exact``, at most ``most``, or any number."""

    exact: int | None = None
    most: int | None = None

    def __str__(self) -> str:
        if self.exact is not None:
            return f"M = {self.exact}"
        return "M >= 1" if self.most is None else f"M <= {self.most}"


@dataclass(frozen=True)
class LinearSpec:
    """One quantized linear, y[M, N] = x[M, K] W[N, K]^T, with its epilogue.

    Parameters
    ----------
    format : str
        Name of the weight format in ``amx_tvm.formats``.
    n, k : int
        True sizes of W; packed buffers pad N to 16 and K to 32.
    activation : Activation
        What x is: exact (then arithmetic is in its type), integers, or four bits like W.
    m : int or None
        Number of rows of x; None compiles a function for every M >= 1.
    m_max : int or None
        The largest M that a symbolic function is meant for; None is any. A hint for the choice of
        a schedule, never a limit on what computes correctly.
    bias, residual, silu_mul : bool
        Epilogue: y = acc (+ bias[N]); silu_mul: y[M, N/2] = silu(gate) * up with gate and up rows
        interleaved in tiles of 16; (+ residual, of y's shape).
    out_dtype : str
        Type of y; on CPUs "float32", or "float16" for a cache of keys and values.
    experts : int
        0, or how many weights of n rows lie behind each other in the buffers (and in the bias): a
        mixture of experts. Rows of x are then sorted by expert; ``bounds`` int32 [experts + 1] are
        the first row of each and the end, and an expert without rows is not read.
    gathered : int
        0, or how many rows of y a row of x has, each by another expert: row s of y is of row
        ``source[s]`` of x then.
    listed : bool
        Each row of y is an expert's alone: ``bounds`` int32 [M] lists them, in any order. Row s is
        of row s // gathered of x then, of row s where nothing is gathered.
    chosen : int
        0, or how many experts of the only row the kernel chooses itself, best first: ``bounds`` is
        float32 [experts], their scores. Row j of y is the j-th one's, times its share.
    over_all : bool
        Shares are the softmax over all scores, not over the chosen ones'.
    joined : bool
        Row j of x is the j-th chosen expert's, and y the sum of them all (of biases, by shares).
    gate_alpha, gate_limit : float
        With silu_mul and an alpha, (up + 1) * gate * sigmoid(alpha * gate) in silu's place, with
        gates of at most the limit and ups within plus and minus it.
    """

    format: str
    n: Count
    k: Count
    activation: Activation = FLOAT32
    m: Count | None = None
    m_max: Count | None = None
    bias: bool = False
    residual: bool = False
    silu_mul: bool = False
    out_dtype: str = "float32"
    experts: Size = 0
    gathered: Size = 0
    listed: bool = False
    chosen: Size = 0
    over_all: bool = False
    joined: bool = False
    gate_alpha: float = 0.0
    gate_limit: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the one JSON form: fields that are not their defaults, the activation as text."""
        given = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        kept = {name: value for name, value, default in given if value != default}
        return {k: str(v) if isinstance(v, Activation) else v for k, v in kept.items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LinearSpec:
        """Read what ``to_json`` wrote, or somebody else.

        Raises
        ------
        Mismatch, FormatError
            For fields and values that no linear has.
        """
        rest = {name: value for name, value in data.items() if name != "activation"}
        activation = Activation.parse(str(data.get("activation", FLOAT32)))
        return replace(conform(LinearSpec, rest, "spec"), activation=activation)

    @property
    def rows(self) -> Rows:
        """The rows that a kernel is for."""
        return Rows(self.m, self.m_max)

    def rows_up_to(self, most: int | None) -> Rows:
        """The rows of the one kernel of a CUDA function that runs up to so many; None is all."""
        return self.rows if most is None else Rows(most=most)

    @property
    def alone(self) -> LinearSpec:
        """The linear that tuning records are made for: without a largest M."""
        return replace(self, m_max=None)

    @cached_property
    def fmt(self):  # noqa: ANN201 - amx_tvm.formats.Format, imported lazily
        """The weight format's registry entry."""
        from amx_tvm import formats

        return formats.get(self.format)

    @property
    def tiles(self) -> int:
        """Row tiles of 16, the last one padded."""
        return -(-self.n // TILE_ROWS)

    @property
    def groups(self) -> int:
        """Column groups of 32, the last one padded."""
        return -(-self.k // GROUP)

    @property
    def k_padded(self) -> int:
        """K rounded up to whole groups."""
        return self.groups * GROUP

    @property
    def out_features(self) -> int:
        """Columns of y: N, or N / 2 when silu(gate) * up is folded in."""
        return self.n // 2 if self.silu_mul else self.n

    @property
    def tile_code_bytes(self) -> int:
        """Bytes of codes of one tile: 256 for four-bit formats, 512 for eight-bit ones."""
        return TILE_ROWS * GROUP * (2 if self.fmt.terms[0].table is None else 1) // 2

    @property
    def tile_scale_bytes(self) -> int:
        """Bytes of scales of one tile: for each scale tensor and sub-group, 16 rows."""
        per_group = GROUP // self.fmt.group_size
        return sum(TILE_ROWS * s.bytes * per_group for s in self.fmt.scale_tensors)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The decode terms of W as integer kernels use them."""
        return kernel_terms(self.fmt, self.activation.group)

    @property
    def needs_sums(self) -> bool:
        """Whether activations come with the sums of their codes.

        Always with int8, where kernels for many rows use offsets of their own; with four bits
        only if a term of W has an offset.
        """
        if self.activation.integer:
            return True
        if self.activation.scheme is Scheme.E4M3:
            return False
        return not self.activation.exact and any(t.offset != 0 for t in self.terms)

    def activation_buffers(self) -> Buffers:
        """List (name, trailing shape after M, dtype) of the activation arguments."""
        return self.activation.buffers(self.k, self.needs_sums)

    def weight_buffers(self, layout: str = "") -> Arguments:
        """List (name, shape, dtype) of the packed weight arguments, as a layout has them.

        Without one it is the CPUs' own: tile16x32, or dense16 for format "none".
        """
        own = "dense16" if self.format == "none" else "tile16x32"
        size = (self.n * max(1, self.experts), self.k)
        shapes = packing.part_shapes(self.format, size, layout or own)
        return tuple((_WEIGHTS.get(n, n), shape, dtype) for n, (shape, dtype) in shapes.items())

    def buffers(self, layout: str = "") -> Arguments:
        """List (name, shape, dtype) of all arguments in order; a leading None is M.

        The layout decides what x and the residual are computed in.
        """
        half = bool(layout) and packing.get_layout(layout).compute == "float16"
        given = (("x", (self.k,), "float16"),) if half else self.activation_buffers()
        if self.activation.scheme is Scheme.E4M3:
            given += self.activation_buffers()
        args = [(name, (None, *shape), dtype) for name, shape, dtype in given]
        args += self.weight_buffers(layout)
        if self.bias:
            args.append(("bias", (self.n * max(1, self.experts),), "float32"))
        if self.residual:
            dtype = "float16" if half else "float32"
            args.append(("residual", (None, self.out_features), dtype))
        if self.gathered and not self.listed and not self.chosen:
            args.append(("source", (None,), "int32"))
        if self.chosen:
            args.append(("bounds", (self.experts,), "float32"))
        elif self.experts:
            args.append(("bounds", (None if self.listed else self.experts + 1,), "int32"))
        args.append(("y", (None, self.out_features), self.out_dtype))
        return tuple(args)

    @property
    def epilogue(self) -> str:
        """Short text of the epilogue, such as "bias+silu_mul"; "" when there is none."""
        parts: Sequence[str] = [p for p in ("bias", "silu_mul", "residual") if getattr(self, p)]
        return "+".join(parts)
