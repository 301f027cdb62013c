# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""The end of a tile: sum of the cluster's parts, epilogue, y."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from relax_passes.spec import LinearSpec

from .arithmetic import CLAMPED_GATE, PACK_HALF2, SILU
from .base import Intrinsic
from .sync import PEER

_PARAMETERS = (
    "unsigned smem, half* y, const void* residual_, const void* bias_, const void* tile_scale_, "
    "int m, int m0, int n0, int rank, int peers, int tid, int threads"
)


@dataclass(frozen=True)
class Finish:
    """What a finished tile goes through.

    factor : what its sums are multiplied by
    rows, block_m : rows of W and of x in the tile
    cluster : blocks that hold a part of each sum
    tile_scale : whether a scale for each 16 rows of W follows
    e4m3 : whether a scale of the row of x and one of W follow
    """

    spec: LinearSpec
    factor: float
    rows: int
    block_m: int
    cluster: int
    tile_scale: bool
    e4m3: bool = False

    @property
    def name(self) -> str:
        """C name, with all that the text depends on."""
        spec = self.spec
        letters = {
            "s": spec.silu_mul,
            "r": spec.residual,
            "b": spec.bias,
            "t": self.tile_scale,
            "e": self.e4m3,
        }
        flags = "".join(letter for letter, on in letters.items() if on) or "plain"
        if spec.gate_alpha:
            flags += f"_{spec.gate_alpha}_{spec.gate_limit}".replace(".", "_")
        factor = str(self.factor).replace(".", "_").replace("-", "_")
        return f"amx_finish_{factor}_{self.rows}_{self.block_m}_{self.cluster}_{spec.n}_{flags}"


@cache
def finish(what: Finish) -> Intrinsic:
    """Write a finished tile.

    The tile is float32 [block_m][rows + 4] in shared memory. Four consecutive columns of y a
    thread.
    """
    spec, cluster, rows = what.spec, what.cluster, what.rows
    n_out = spec.out_features
    outs = rows // 2 if spec.silu_mul else rows
    full = n_out % 4 == 0
    read = (
        "amx_peer4(a, peers + p)" if cluster > 1 else "*(const float4*)__cvta_shared_to_generic(a)"
    )
    pieces = [f"v[i] *= {what.factor}f;"] if what.factor != 1.0 else []
    if what.e4m3:
        pieces.append("v[i] *= row_scale;")
    if what.tile_scale:
        pieces.append("v[i] *= tile_scale[(n0 + column + i) >> 4];")
    if spec.bias:
        pieces.append(f"v[i] += bias[min(n0 + column + i, {spec.n - 1})];")
    if spec.silu_mul:
        gather = "const int column = (c >> 4) * 32 + (c & 15);"
        gated = "amx_silu(g[i]) * u[i]"
        if spec.gate_alpha:
            gated = f"amx_clamped_gate(g[i], u[i], {spec.gate_alpha}f, {spec.gate_limit}f)"
        combine = f"""float g[4], u[4];
    part(column, g); part(column + 16, u);
    for (int i = 0; i < 4; ++i) o[i] = {gated};"""
        origin = "(n0 >> 1)"
    else:
        gather, combine, origin = "const int column = c;", "part(column, o);", "n0"
    residual = f"o[i] += __half2float(residual[(long long)row * {n_out} + out + i]);"
    store_full = f"""uint2 packed = make_uint2(amx_pack_half2(o[0], o[1]), amx_pack_half2(o[2], o[3]));
    *(uint2*)(y + (long long)row * {n_out} + out) = packed;"""
    store_each = f"""for (int i = 0; i < 4; ++i)
      if (out + i < {n_out}) y[(long long)row * {n_out} + out + i] = __float2half_rn(o[i]);"""
    guard = "" if full else f"if (out + i < {n_out}) "
    add = f"for (int i = 0; i < 4; ++i) {guard}{residual}" if spec.residual else ""
    given = ""
    row_scale = ""
    if what.e4m3:
        given = ", const void* x_scale, const void* w_scale"
        row_scale = (
            "\n    const float row_scale = ((const float*)x_scale)[row] * *(const float*)w_scale;"
        )
    return Intrinsic(
        what.name,
        f"""
  const half* residual = (const half*)residual_;
  const float *bias = (const float*)bias_, *tile_scale = (const float*)tile_scale_;
  for (int id = tid; id < {what.block_m * outs // 4 // cluster}; id += threads) {{
    const int local = (id / {outs // 4}) * {cluster} + rank, c = (id % {outs // 4}) * 4, row = m0 + local;
    const int out = {origin} + c;
    if (row >= m || out >= {n_out}) continue;{row_scale}
    {gather}
    auto part = [&](int column, float* v) {{
      v[0] = v[1] = v[2] = v[3] = 0.0f;
#pragma unroll
      for (int p = 0; p < {cluster}; ++p) {{
        const unsigned a = smem + (local * {rows + 4} + column) * 4;
        const float4 q = {read};
        v[0] += q.x; v[1] += q.y; v[2] += q.z; v[3] += q.w;
      }}
#pragma unroll
      for (int i = 0; i < 4; ++i) {{ {" ".join(pieces)} }}
    }};
    float o[4];
    {combine}
    {add}
    {store_full if full else store_each}
  }}""",
        (PEER[4], PACK_HALF2, CLAMPED_GATE if spec.gate_alpha else SILU),
        f"void({_PARAMETERS}{given})",
    )
