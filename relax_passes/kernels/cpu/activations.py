"""What happens to activations between linears: norms, silu(gate) * up, GELU, quantization.

One row of x is one pass: a prologue (nothing, RMSNorm, silu * up, GELU) feeds 32 columns at a time
to the quantizer, so a normalized row is never stored as float32.  Rows run in parallel when there
are enough of them; a single row is serial, since waking a second thread takes longer than the row.

Quantization to int8; four bits are in fp4.py:

    codes int8 [M, Kp], scales float32 [M, Kp/32] = max|x| / 127, sums int32 [M, Kp/32]
    code = round half to even of x / scale (true division); an all-zero group has scale 0

Scheme "int8-outliers" adds second bytes for some groups: outliers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from relax_passes.activation import GROUP, INT8, Activation, Scheme

from . import emit as e
from . import fp4
from .emit import Expr
from .fp4_integers import Fp4Integers
from .math import gelu, gelu_tanh, silu
from .outliers import FACTOR, LOW_STEPS, list_groups

LANES = 16
PARALLEL_VALUES = 16384  # fewer values than this stay on one thread
PROLOGUES = {
    "none": ("x",),
    "rms_norm": ("x", "weight"),
    "silu_mul": ("gate", "up"),
    "gelu": ("x",),
    "gelu_tanh": ("x",),
    "gelu_mul": ("gate", "up"),
}


_ALONE = {"gelu": gelu, "gelu_tanh": gelu_tanh}


def over_rows(m: Expr, k: int, body: Callable[[Expr], None]) -> None:
    """Run ``body(row)`` for all rows of ``k`` values, in parallel when there are many.

    A thread that joins has to fetch what it reads from the other core's cache, and what it writes
    is fetched back: eight rows of 576 take 5 us on one thread and 10 on two.
    """
    rows = max(2, -(-PARALLEL_VALUES // k))
    if isinstance(m, tirx.IntImm):
        loop = e.parallel if int(m) >= rows else e.serial
        with loop(0, m) as row:
            body(row)
        return
    with e.when(m >= rows):
        with e.then(), e.parallel(0, m) as row:
            body(row)
        with e.otherwise(), e.serial(0, m) as row:
            body(row)


def _inputs(prologue: str, k: int, source: str = "float32") -> list[tuple[str, tuple, str]]:
    if prologue not in PROLOGUES:
        raise ValueError(f"unknown prologue {prologue!r}; known: {', '.join(PROLOGUES)}")
    return [
        (name, (k,), "float32") if name == "weight" else (name, (None, k), source)
        for name in PROLOGUES[prologue]
    ]


class Prologue:
    """Produces the values of a row, 16 columns at a time."""

    def __init__(self, kind: str, buffers: dict[str, Any], k: int, eps: float, row: Expr):
        self.kind, self.buffers, self.k, self.row = kind, buffers, k, row
        self.inverse = self._inverse_rms(eps) if kind == "rms_norm" else None

    def at(self, column: Expr, lanes: int = LANES) -> Expr:
        """Return the values of ``lanes`` columns."""
        if self.kind in ("silu_mul", "gelu_mul"):
            gate = self._load("gate", column, lanes)
            activation = silu if self.kind == "silu_mul" else gelu
            return e.let(activation(gate, lanes) * self._load("up", column, lanes))
        x = self._load("x", column, lanes)
        if self.kind in _ALONE:
            return _ALONE[self.kind](x, lanes)
        if self.kind == "rms_norm":
            weight = e.load(self.buffers["weight"], column, lanes=lanes)
            x = x * e.splat(self.inverse, lanes) * weight
        return e.let(x)

    def _load(self, name: str, column: Expr, lanes: int) -> Expr:
        """Load values of the row as float32."""
        value = e.load(self.buffers[name], self.row, column, lanes=lanes)
        if self.buffers[name].dtype == "float32":
            return value
        return e.let(e.cast(value, "float32", lanes))

    def _inverse_rms(self, eps: float) -> Expr:
        """1 / sqrt(mean of squares + eps), summed in 64 float32 lanes."""
        k = self.k
        zero = e.const(0.0, "float32", LANES)
        sums = [e.Register("float32", LANES, zero) for _ in range(4)]
        wide = 4 * LANES
        if k // wide:
            with e.serial(0, k // wide) as i:
                for j, register in enumerate(sums):
                    v = e.let(self._load("x", i * wide + j * LANES, LANES))
                    register.set(e.fma(v, v, register.get(), LANES))
        done = k // wide * wide
        for column in range(done, k // LANES * LANES, LANES):
            v = e.let(self._load("x", column, LANES))
            sums[0].set(e.fma(v, v, sums[0].get(), LANES))
        total = e.Register("float32", 1)
        lanes = e.let((sums[0].get() + sums[1].get()) + (sums[2].get() + sums[3].get()))
        total.set(horizontal_sum(lanes, LANES))
        for column in range(k // LANES * LANES, k):
            v = e.let(self._load("x", e.const(column), 1))
            total.set(total.get() + v * v)
        mean = total.get() * e.const(1.0 / k, "float32")
        return e.let(e.const(1.0, "float32") / tirx.sqrt(mean + e.const(eps, "float32")))


def horizontal_sum(value: Expr, lanes: int) -> Expr:
    """Add the float32 lanes of a vector pairwise (halves, then halves of that)."""
    while lanes > 1:
        lanes //= 2
        low = [tirx.const(i, "int32") for i in range(lanes)]
        high = [tirx.const(lanes + i, "int32") for i in range(lanes)]
        value = e.let(value)
        value = e.let(tirx.Shuffle([value], low) + tirx.Shuffle([value], high))
    return value


def rms_norm(k: int, m: int | None = None, eps: float = 1e-5) -> Any:
    """Build y = x / sqrt(mean(x^2) + eps) * weight; arguments x [M, K], weight [K], y [M, K]."""
    return _map_rows("rms_norm", k, m, eps)


def silu_mul(k: int, m: int | None = None) -> Any:
    """Build y = silu(gate) * up; arguments gate [M, K], up [M, K], y [M, K]."""
    return _map_rows("silu_mul", k, m, 0.0)


def gelu_rows(k: int, m: int | None = None, kind: str = "gelu") -> Any:
    """Build y = x * Phi(x), or what "gelu_tanh" takes for it; arguments x [M, K], y [M, K]."""
    return _map_rows(kind, k, m, 0.0)


def _map_rows(kind: str, k: int, m: int | None, eps: float) -> Any:
    arguments = [*_inputs(kind, k), ("y", (None, k), "float32")]
    with e.function(kind, arguments, m) as (buffers, rows):

        def body(row: Expr) -> None:
            values = Prologue(kind, buffers, k, eps, row)
            if k // LANES:
                with e.serial(0, k // LANES) as i:
                    e.store(buffers["y"], values.at(i * LANES), row, i * LANES, lanes=LANES)
            for column in range(k // LANES * LANES, k):
                e.store(buffers["y"], values.at(e.const(column), 1), row, column)

        over_rows(rows, k, body)
    return buffers["func"]


def quantize(
    k: int,
    m: int | None = None,
    scheme: Activation = INT8,
    sums: bool = False,
    prologue: str = "none",
    eps: float = 0.0,
    source: str = "float32",
) -> Any:
    """Build the quantization of activations, optionally behind RMSNorm or silu * up.

    Parameters
    ----------
    k : int
        Columns of x; codes are padded with zeros to whole groups of 32.
    m : int or None
        Rows, None for any.
    scheme : Activation
        Integers or four bits; what is written is listed by its ``buffers``.
    sums : bool
        Also store the sums of each scale group's codes.
    prologue : str
        "none" (x), "rms_norm" (x, weight) or "silu_mul" (gate, up).
    eps : float
        RMSNorm's epsilon.
    source : str
        Type of the inputs but the norm's weight: "float32" or "float16".

    Returns
    -------
    tvm.tirx.PrimFunc
        Arguments: the prologue's inputs, then the quantized buffers.

    Raises
    ------
    FormatError
        The format has no kernel that quantizes activations to it.
    """
    outputs = [(n, (None, *s), d) for n, s, d in scheme.buffers(k, sums)]
    name = f"{prologue}_quantize_{scheme.name}".removeprefix("none_")
    with e.function(name, [*_inputs(prologue, k, source), *outputs], m) as (buffers, rows):
        emit_quantize(rows, buffers, k, scheme, prologue, eps)
    return buffers["func"]


def emit_quantize(
    rows: Expr, buffers: dict[str, Any], k: int, scheme: Activation, prologue: str, eps: float
) -> None:
    """Emit the quantization of all rows, into a function that has the buffers."""
    over_rows(rows, k, lambda row: quantize_row(row, buffers, k, scheme, prologue, eps))


def quantize_row(
    row: Expr, buffers: dict[str, Any], k: int, scheme: Activation, prologue: str, eps: float
) -> None:
    """Emit the quantization of one row."""
    values = Prologue(prologue, buffers, k, eps, row)
    if scheme.integer:
        integers: Integers | Fp4Integers
        if scheme.scheme is Scheme.FOUR_BIT:
            integers = Fp4Integers(scheme.fmt, buffers, row, k)
        else:
            integers = Integers(buffers, row, k, scheme.outliers)
        for_groups(values, k, integers.measure)
        integers.choose_scales()
        for_groups(values, k, integers.store)
        return
    fmt, tensor_scale = scheme.fmt, None
    if fmt.row_scaled:
        best = e.Register("int32", 1, e.const(0))

        def largest(_group: Expr, vectors: list[Expr]) -> None:
            best.set(tirx.max(best.get(), fp4.extrema(vectors, (0,))[0]))

        for_groups(values, k, largest)
        tensor_scale = fp4.row_tensor_scale(e.bits(best.get(), "float32"))
    quantizer = fp4.Fp4Quantizer(fmt, buffers, row, tensor_scale)
    per_group = GROUP // fmt.group_size
    each = fmt.group_size // LANES

    def each_group(step: Callable[[Expr, list[Expr]], None]) -> None:
        def body(group: Expr, vectors: list[Expr]) -> None:
            for i in range(per_group):
                step(group * per_group + i, vectors[i * each : (i + 1) * each])

        for_groups(values, k, body)

    each_group(quantizer.measure)
    each_group(quantizer.store)


def for_groups(values: Prologue, k: int, body: Callable[[Expr, list[Expr]], None]) -> None:
    """Run ``body(group, two 16-lane vectors)`` over groups of 32, the last padded with zeros."""
    whole = k // GROUP
    if whole:
        with e.serial(0, whole) as group:
            body(group, [values.at(group * GROUP + j * LANES) for j in range(2)])
    if k % GROUP:
        padded = e.scratch(GROUP, "float32")
        e.store(padded, e.const(0.0, "float32", GROUP), 0, lanes=GROUP)
        for i in range(k % GROUP):
            e.store(padded, values.at(e.const(whole * GROUP + i), 1), i)
        body(e.const(whole), [e.let(e.load(padded, j * LANES, lanes=LANES)) for j in range(2)])


class Integers:
    """Quantizes the groups of one row to int8, and with second bytes where there are outliers.

    Three passes, so that no step waits for the one before it: the groups' largest values (kept in
    ``scales``), the scales of 16 groups at a time, the codes.
    """

    def __init__(self, buffers: dict[str, Any], row: Expr, k: int, outliers: bool):
        self.buffers, self.row, self.k, self.outliers = buffers, row, k, outliers
        self.groups = -(-k // GROUP)
        self.steps = LOW_STEPS if outliers else 1  # codes are made in this many steps of one
        zero = e.const(0.0, "float32", LANES)
        self.squares = [e.Register("float32", LANES, zero) for _ in range(2 if outliers else 0)]

    def measure(self, group: Expr, values: list[Expr]) -> None:
        """Note a group's largest value, and add to the row's squares."""
        largest = e.bits(fp4.extrema(values, (0,))[0], "float32")
        e.store(self.buffers["scales"], largest, self.row, group)
        for v, squares in zip(values, self.squares, strict=False):
            squares.set(e.fma(v, v, squares.get(), LANES))

    def choose_scales(self) -> None:
        """List the groups with outliers and turn largest values into scales."""
        if self.outliers:
            total = e.let(self.squares[0].get() + self.squares[1].get())
            self.list_outliers(horizontal_sum(total, LANES), self.buffers["scales"])
        whole = self.groups // LANES
        if whole:
            with e.serial(0, whole) as i:
                self.scales_of(i * LANES, LANES)
        for group in range(whole * LANES, self.groups):
            self.scales_of(e.const(group), 1)

    def list_outliers(self, squares: Expr, largest_values: Any) -> None:
        """List the groups with a value above a multiple of the row's quadratic mean."""
        mean = e.let(squares) * e.const(1.0 / self.k, "float32")
        limit = e.let(tirx.sqrt(mean) * e.const(FACTOR, "float32"))

        def holds(group: Expr) -> Expr:
            return e.cast(e.load(largest_values, self.row, group) > limit, "int32")

        list_groups(self.buffers["outliers"], self.row, self.groups, holds)

    def scales_of(self, group: Expr, lanes: int) -> None:
        """Turn the largest values of ``lanes`` groups into scales."""
        scales, steps = self.buffers["scales"], float(self.steps)
        largest = e.load(scales, self.row, group, lanes=lanes)
        scale = e.let(largest / e.const(127.0 * steps, "float32", lanes))
        e.store(scales, scale * e.const(steps, "float32", lanes), self.row, group, lanes=lanes)

    def store(self, group: Expr, values: list[Expr]) -> None:
        """Quantize and store one group of 32.

        With second bytes codes are made in 256 steps; the high byte, rounded to nearest, is int8.
        """
        steps, buffers, row = self.steps, self.buffers, self.row
        # Exact, since 256 is a power of two and was multiplied before.
        scale = e.let(e.load(buffers["scales"], row, group) * e.const(1.0 / steps, "float32"))
        zero, one = e.const(0.0, "float32"), e.const(1.0, "float32")
        divisor = e.let(e.splat(tirx.Select(scale == zero, one, scale), LANES))
        top = e.const(127.0 * steps, "float32", LANES)
        totals = [e.const(0, "int32", LANES)] * 2
        for j, v in enumerate(values):
            code = e.llvm(f"float32x{LANES}", "llvm.rint", v / divisor)
            # A subnormal scale is inexact, and its quotients may pass the largest code.
            code = tirx.max(tirx.min(code, top), e.const(-127.0 * steps, "float32", LANES))
            high = code = e.let(e.cast(code, "int32", LANES))
            at = group * GROUP + j * LANES
            if self.outliers:
                high = e.let((code + e.const(128, "int32", LANES)) >> e.const(8, "int32", LANES))
                low = e.let(code - (high << e.const(8, "int32", LANES)))
                e.store(buffers["codes_low"], e.cast(low, "int8", LANES), row, at, lanes=LANES)
                totals[1] = totals[1] + low
            e.store(buffers["codes"], e.cast(high, "int8", LANES), row, at, lanes=LANES)
            totals[0] = totals[0] + high
        for name, total in zip(("sums", "sums_low"), totals, strict=True):
            if name in buffers:
                value = e.llvm("int32", "llvm.vector.reduce.add", e.let(total))
                e.store(buffers[name], value, row, group)
