"""W4A4 for many rows of x: both operands become bf16 exactly, then one vdpbf16ps for two columns.

An E2M1 value times its E5M2, E4M3 or E8M0 scale has at most six significant bits, so bf16 (eight)
holds both operands as they are and the float32 sums need no scale inside the loop:

    x bf16 [M, Kp]            made once, from the integer codes and scales
    for each panel of row tiles, in parallel
        W bf16 [tiles, Kp / 2, 16 rows, 2 columns]   a 32-bit lane is a row, its halves k and k + 1
        for each block of rows of x: acc[row of x][tile] += two columns at a time

It serves the formats whose groups are no bytes (panel_w4a4.py): E4M3 scales, groups of 16.
Formats whose scales are float16 (int4, int8) or whose activations have a float32 scale a token do
not fit and stay with the integer kernel.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from relax_passes.activation import Scheme
from relax_passes.kernels.cpu import emit as e
from relax_passes.kernels.cpu.emit import Expr
from relax_passes.kernels.cpu.isa.avx512 import Avx512
from relax_passes.kernels.cpu.isa.base import Isa
from relax_passes.kernels.cpu.scale_reader import ScaleReader
from relax_passes.spec import GROUP, TILE_ROWS, LinearSpec
from relax_passes.terms import common_factor

from .epilogue import Epilogue
from .knobs import CpuKnobs
from .rows import equal_blocks

SMALL_SCALES = {"E5M2", "E4M3", "E8M0"}
BLOCK = 8  # rows of x; three tiles make 24 accumulators
PAIRS = GROUP // 2
# TVM 0.27 rewrites bf16 vectors before LLVM sees them, so the intrinsic is called from LLVM text.
DOT_NAME = "amx_dpbf16ps_512"
DOT_TEXT = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define linkonce_odr <16 x float> @{DOT_NAME}(<16 x float> %acc, <16 x i32> %a, <16 x i32> %b)
    alwaysinline nounwind {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %acc, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}}
"""


def from_rows(spec: LinearSpec, isa: Isa, knobs: CpuKnobs) -> int | None:
    """Return the rows from which on this is a linear's kernel: both operands are exact in bf16."""
    wide = isinstance(isa, Avx512) and isa.bf16
    if not wide or spec.activation.scheme is not Scheme.FOUR_BIT or spec.experts:
        return None
    x = spec.activation.fmt
    types = {t.type.name for f in (spec.fmt, x) for t in f.scale_tensors}
    if not types <= SMALL_SCALES or x.row_scaled:
        return None
    return max(knobs.panel_rows, BLOCK)


def emit_bf16(spec: LinearSpec, isa: Avx512, knobs: CpuKnobs, buffers: Any, m: Expr) -> None:
    """Emit the whole linear for M rows."""
    width = spec.k_padded
    with e.llvm_text(DOT_TEXT):
        x = e.workspace((m * width,), "uint16")
        _emit_activations(spec, buffers, x, m)
        wide = 2 if spec.silu_mul or spec.tiles % 3 else 3
        with e.parallel(0, -(-spec.tiles // wide)) as block:
            panel = e.workspace((wide * spec.groups * PAIRS, TILE_ROWS), "int32")
            first = e.let(block * wide)
            decoder = _Decoder(spec, isa, buffers, panel)
            with e.serial(0, wide) as c, e.serial(0, spec.groups) as group:
                tile = e.let(e.clamped(first + c, spec.tiles - 1))
                decoder.decode(tile, group, c * spec.groups + group)
            epilogue = Epilogue(spec, buffers, TILE_ROWS, decoder.factor)

            def body(row: Expr, rows: int) -> None:
                row = e.let(row)
                sums = _products(spec, x, panel, row, rows, wide)
                _finish(spec, epilogue, sums, first, row)

            equal_blocks(m, BLOCK, body)


def _emit_activations(spec: LinearSpec, buffers: Any, x: Any, m: Expr) -> None:
    """Emit the conversion of the codes and scales to bf16 patterns, 16 columns at a time."""
    names = [name for name, _, _ in spec.activation_buffers() if name.startswith("codes")]
    per_group = GROUP // spec.activation.group
    with e.parallel(0, m) as row, e.serial(0, spec.groups) as group:
        for j in range(2):
            value = None
            for name in names:
                codes = e.load(buffers[name], row, group * GROUP + j * 16, lanes=16)
                scales = buffers[name.replace("codes", "scales")]
                scale = e.load(scales, row, group * per_group + j * per_group // 2)
                part = e.let(e.cast(codes, "float32", 16) * e.splat(scale, 16))
                value = part if value is None else value + part
            high = e.bits(e.let(value), "uint32", 16) >> e.const(16, "uint32", 16)
            at = row * spec.k_padded + group * GROUP + j * 16
            e.store(x, e.cast(high, "uint16", 16), at, lanes=16)


class _Decoder:
    """Emits the decode of one tile and group to pairs of bf16."""

    def __init__(self, spec: LinearSpec, isa: Avx512, buffers: Any, panel: Any):
        self.spec, self.isa, self.buffers, self.panel = spec, isa, buffers, panel
        self.terms = spec.fmt.terms
        self.reader = ScaleReader(spec.fmt, buffers["w_scales"])
        self.factor = common_factor(self.terms)
        tables = [tuple(v - t.offset for v in t.table) for t in self.terms]
        self.tables = [isa.float_table(t) for t in tables]

    def decode(self, tile: Expr, group: Expr, at: Expr) -> None:
        """Decode tile ``tile``, group ``group`` to panel[at * 16 + pair, row]."""
        vectors = 4 // self.reader.sub_groups
        for sub in range(self.reader.sub_groups):
            scales = []
            for t in self.terms:
                scale = self.reader.scale(t.scale, tile, group, sub, 0, TILE_ROWS)
                sign = e.const(t.factor / self.factor, "float32", TILE_ROWS)
                scales.append(e.let(scale * sign))
            with e.serial(sub * vectors, (sub + 1) * vectors) as v:
                packed = e.let(e.load(self.buffers["w_codes"], tile, group, v * 64, lanes=64))
                columns = self.isa.float_columns(packed, self.tables, False)
                for pair in range(4):
                    low, high = (self._weight(columns[2 * pair + i], scales) for i in (0, 1))
                    top = e.const(-65536, "int32", TILE_ROWS)
                    low = e.bits(low, "uint32", TILE_ROWS) >> e.const(16, "uint32", TILE_ROWS)
                    both = e.bits(low, "int32", TILE_ROWS) | (
                        e.bits(high, "int32", TILE_ROWS) & top
                    )
                    e.store(self.panel, both, at * PAIRS + v * 4 + pair, 0, lanes=TILE_ROWS)

    def _weight(self, values: list[Expr], scales: list[Expr]) -> Expr:
        total = values[0] * scales[0]
        for value, scale in zip(values[1:], scales[1:], strict=True):
            total = e.fma(value, scale, total, TILE_ROWS)
        return e.let(total)


def _products(
    spec: LinearSpec, x: Any, panel: Any, row: Expr, rows: int, wide: int
) -> list[list[e.Register]]:
    """Emit the loop over K; returns registers [tile][row]."""
    zero = e.const(0.0, "float32", TILE_ROWS)
    pairs = spec.groups * PAIRS
    out = [[e.Register("float32", TILE_ROWS, zero) for _ in range(rows)] for _ in range(wide)]
    with e.serial(0, pairs) as p:
        weights = [e.let(e.load(panel, c * pairs + p, 0, lanes=TILE_ROWS)) for c in range(wide)]
        for r in range(rows):
            pair = e.bits(e.load(x, (row + r) * spec.k_padded + p * 2, lanes=2), "int32")
            a = e.let(e.splat(pair, TILE_ROWS))
            for c in range(wide):
                register = out[c][r]
                args = (register.get(), weights[c], a)
                register.set(tirx.call_extern("float32x16", DOT_NAME, *args))
    return out


def _finish(
    spec: LinearSpec, epilogue: Epilogue, sums: list[list[e.Register]], first: Expr, row: Expr
) -> None:
    values = [[[r.get()] for r in tile] for tile in sums]
    if spec.silu_mul:
        epilogue.rows(values, e.let(first // 2), row)
        return
    for c, tile_values in enumerate(values):
        tile = e.let(first + c)
        if c and spec.tiles % len(values):
            with e.when(tile < spec.tiles), e.then():
                epilogue.rows([tile_values], tile, row)
        else:
            epilogue.rows([tile_values], tile, row)
