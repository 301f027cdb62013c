"""A mixture's routing: the CUDA text run on the CPU, kernels compiled, and blocks of products."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from choosing import on_cpu, pointers  # noqa: E402
from cuda_compiled import compile_functions, needs_nvcc  # noqa: E402

from amx_tvm.errors import TargetError  # noqa: E402
from amx_tvm.targets.cuda.gpus import gpu  # noqa: E402
from amx_tvm.targets.cuda.target import target  # noqa: E402
from relax_passes.activation import FLOAT16  # noqa: E402
from relax_passes.kernels.cuda.experts import kernels, text  # noqa: E402
from relax_passes.kernels.cuda.intrinsics.base import Source  # noqa: E402
from relax_passes.kernels.cuda.linear import function  # noqa: E402
from relax_passes.kernels.registry import linear_kernel  # noqa: E402
from relax_passes.spec import LinearSpec  # noqa: E402

E, CHOSEN, N, K = 70, 5, 40, 520  # experts of three rounds of lanes; columns of no whole warp
ITEM_ROWS = 4
HALVES = """
#define __expf expf
typedef _Float16 half;
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
inline float __half2float(half v) { return v; }
inline half __float2half_rn(float v) { return v; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels' text on the CPU, its threads as fibers."""
    functions = f"""
extern "C" void scores(int m, int r, half* x, float* w, float* bias, float* scores) {{
  for (int row = 0; row < m; row += r)
    for (int expert = 0; expert < {E}; expert += 4)
      run_team(1, 128, [=](int i) {{
        if (r == 1) amx_expert_scores<{E}, {K}, 1, 4, 4>(shared_of(0), x, w, bias, scores, m, row, expert, i / 32, i % 32);
        else amx_expert_scores<{E}, {K}, 4, 4, 4>(shared_of(0), x, w, bias, scores, m, row, expert, i / 32, i % 32);
      }});
}}
extern "C" void route(int m, int all, float* scores, int* ids, float* shares) {{
  for (int row = 0; row < m; ++row)
    run_team(1, 32, [=](int i) {{
      float* s = scores + row * {E};
      int* to = ids + row * {CHOSEN};
      float* w = shares + row * {CHOSEN};
      if (all) amx_expert_route<{E}, {CHOSEN}, true>(s, to, w, i);
      else amx_expert_route<{E}, {CHOSEN}, false>(s, to, w, i);
    }});
}}
extern "C" void group(int slots, int* ids, int* source, int* place, int* bounds) {{
  for (int expert = 0; expert < {E}; ++expert)
    run_team(1, 256, [=](int i) {{
      amx_expert_group<{E}, {CHOSEN}, 256>((int*)shared_of(0), ids, source, place, bounds, slots, expert, i);
    }});
}}
extern "C" void items(int count, int* bounds, int* found) {{
  for (int item = 0; item < count; ++item)
    run_team(1, 32, [=](int i) {{
      int mine[3];
      amx_expert_item<{E}, {ITEM_ROWS}>(mine, bounds, item, i);
      if (i == 7) memcpy(found + 3 * item, mine, sizeof(mine));
    }});
}}
extern "C" void sums(int m, half* y, float* shares, int* place, half* residual, half* out) {{
  for (int row = 0; row < m; ++row)
    for (int column = 0; column < {N}; column += 8)
      amx_expert_sum<{N}, {CHOSEN}>(y, shares + row * {CHOSEN}, place + row * {CHOSEN},
                                    residual ? residual + row * {N} : nullptr, out + row * {N}, column);
}}
"""  # noqa: E501
    parts = (text.SCORES, text.ROUTE, text.GROUP, text.ITEM, text.SUM)
    whole = Source("all", "", parts).full_text
    return on_cpu(HALVES + whole, functions, tmp_path_factory.mktemp("experts"))


def routed(library, scores: np.ndarray, over_all: bool) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(scores), CHOSEN), -9, np.int32)
    shares = np.zeros(ids.shape, np.float32)
    library.route(len(scores), int(over_all), *pointers(scores, ids, shares))
    return ids, shares


def grouped(library, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    source, place = np.full((2, *ids.shape), -9, np.int32)
    bounds = np.full(E + 1, -9, np.int32)
    library.group(ids.size, *pointers(ids, source, place, bounds))
    return source.reshape(-1), place, bounds


@pytest.mark.parametrize("m,together", [(1, 1), (6, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_scores(library, m, together, bias):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((m, K)).astype(np.float16)
    w, b = (rng.standard_normal(s).astype(np.float32) for s in ((E, K), (E,)))
    got = np.full((m, E), np.nan, np.float32)
    library.scores(m, together, *pointers(x, w), *(pointers(b) if bias else [None]), *pointers(got))
    expected = x.astype(np.float64) @ w.T + (b if bias else 0)
    np.testing.assert_allclose(got, expected, atol=3e-5)
    alone = np.empty_like(got)
    for i in range(m):  # bit for bit the same in every batch
        row = np.ascontiguousarray(x[i : i + 1])
        out = alone[i : i + 1]
        library.scores(1, 1, *pointers(row, w), *(pointers(b) if bias else [None]), *pointers(out))
    np.testing.assert_array_equal(got, alone)


@pytest.mark.parametrize("over_all", [True, False])
def test_route(library, over_all):
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((7, E)).astype(np.float32) * 3
    scores[1] = np.round(scores[1])  # equals: the first counts
    scores[2] = 0.5
    scores[3] = np.nan
    scores[4, 3::2] = -np.inf
    ids, shares = routed(library, scores, over_all)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :CHOSEN]
    np.testing.assert_array_equal(np.delete(ids, 3, 0), np.delete(order, 3, 0))
    assert ((ids >= 0) & (ids < E)).all()  # rows of padding too
    weights = np.exp(scores - scores.max(1, keepdims=True))
    chosen = np.take_along_axis(weights, order, 1)
    expected = chosen / (weights if over_all else chosen).sum(1, keepdims=True)
    np.testing.assert_allclose(np.delete(shares, 3, 0), np.delete(expected, 3, 0), rtol=1e-5)


@pytest.mark.parametrize("m", [1, 3, 200])
def test_group(library, m):
    rng = np.random.default_rng(2)
    ids = np.stack([rng.permutation(E // 2)[:CHOSEN] for _ in range(m)]).astype(np.int32)
    if m == 3:
        ids[2] = 0  # what a row of NaN takes
    source, place, bounds = grouped(library, ids)
    order = np.argsort(ids.reshape(-1), kind="stable")
    np.testing.assert_array_equal(source, order // CHOSEN)
    np.testing.assert_array_equal(place.reshape(-1)[order], np.arange(ids.size))
    np.testing.assert_array_equal(bounds, np.searchsorted(np.sort(ids.reshape(-1)), range(E + 1)))


@pytest.mark.parametrize("m", [1, 3, 40])
def test_every_row_is_in_one_item(library, m):
    rng = np.random.default_rng(3)
    ids = (rng.integers(0, E, (m, CHOSEN)) ** 2 // E).astype(np.int32)
    bounds = grouped(library, ids)[2]
    most = ids.size // ITEM_ROWS + min(ids.size, E)  # as experts.items has it
    found = np.zeros((most + 2, 3), np.int32)
    library.items(len(found), *pointers(bounds, found))
    real = found[found[:, 0] >= 0]
    assert (found[len(real) :, 0] == -1).all() and len(real) <= most
    rows = [(e, r) for e, first, end in real for r in range(first, end)]
    assert rows == [(e, r) for e in range(E) for r in range(bounds[e], bounds[e + 1])]
    assert all(end - first <= ITEM_ROWS for _, first, end in real)


@pytest.mark.parametrize("residual", [True, False])
def test_sum(library, residual):
    rng = np.random.default_rng(4)
    m = 6
    y, more = (rng.standard_normal((s, N)).astype(np.float16) for s in (m * CHOSEN, m))
    shares = rng.random((m, CHOSEN)).astype(np.float32)
    place = rng.permutation(m * CHOSEN).reshape(m, CHOSEN).astype(np.int32)
    got = np.zeros((m, N), np.float16)
    given = pointers(more) if residual else [None]
    library.sums(m, *pointers(y, shares, place), *given, *pointers(got))
    expected = (shares[..., None] * y[place].astype(np.float32)).sum(1) + (more if residual else 0)
    np.testing.assert_allclose(got, expected, atol=4e-3)


def routing(arch: str, m: int | None) -> dict:
    dependent = gpu(arch).clusters
    return {
        "scores": kernels.scores(32, 2880, True, m, dependent),
        "route": kernels.route(32, 4, False, m, dependent),
        "group": kernels.group(32, 4, m, dependent),
        "combine": kernels.combine(2880, 4, m is None, True, m, dependent),
    }


@needs_nvcc
@pytest.mark.parametrize("arch,m", [("sm_80", None), ("sm_90a", 1), ("sm_90a", None)])
def test_routing_compiles(arch, m):
    made = compile_functions(routing(arch, m), arch)
    assert made.cubin[:4] == b"\x7fELF" and len(made.resources()) >= 4
    assert not any(r.spilled for r in made.resources().values())


def spec_of(m: int | None = None, **more) -> LinearSpec:
    options = {"out_dtype": "float16", "experts": 8, **more}
    return LinearSpec("mxfp4", 256, 512, FLOAT16, m=m, **options)


GATE = {"silu_mul": True, "bias": True, "gate_alpha": 1.702, "gate_limit": 7.0}


@needs_nvcc
@pytest.mark.parametrize(
    "arch,more",
    [
        ("sm_80", GATE),
        ("sm_90a", {}),
        ("sm_90a", {"gathered": 2, **GATE}),
        ("sm_90a", {"m": 2, "listed": True}),
    ],
)
def test_products_compile(arch, more):
    facts = gpu(arch)
    func = function.build(spec_of(**more), facts, dependent=facts.clusters)
    made = compile_functions({"products": func}, arch)
    assert made.cubin[:4] == b"\x7fELF"
    bodies = made.code.split('extern "C" __global__')[1:]
    bodies = [b for b in bodies if "{" in b.partition(";")[0]]
    finds = r"amx_expert_item<8, (\d+)>|amx_expert_(listed)\("
    found = {a or b for body in bodies for a, b in re.findall(finds, body)}
    many = {"4", "8", "32", "64", "128"}
    many |= {"256"} if arch == "sm_90a" and "gathered" not in more else set()
    assert found == ({"listed"} if "listed" in more else many)
    assert any("amx_tile_wgmma_" in b for b in bodies) == (arch == "sm_90a" and not more)
    assert any("amx_gather_x<" in b for b in bodies) == ("gathered" in more)


@needs_nvcc
def test_all_blocks_of_one_row_are_resident_at_once():
    """The second products of gpt-oss and Mixtral: by the registers that ptxas took."""
    oss = {"experts": 32, "chosen": 4}
    given = {
        "oss_down": LinearSpec("mxfp4", 2880, 2880, m=1, joined=True, bias=True, **oss),
        "mixtral_down": LinearSpec("amxfp4", 4096, 14336, m=1, experts=8, chosen=2, joined=True),
    }
    facts = gpu("sm_90a")
    specs = {k: replace(s, activation=FLOAT16, out_dtype="float16") for k, s in given.items()}
    functions = {k: function.build(s, facts, dependent=True) for k, s in specs.items()}
    used = compile_functions(functions, "sm_90a").resources()
    for name, spec in specs.items():
        (bucket,) = function.buckets_of(spec, facts)
        knobs = bucket.knobs
        blocks = spec.tiles // knobs.tiles * (spec.m or 1)
        registers = -(-used[f"{name}_kernel"].registers // 8) * 8 * 32 * knobs.warps
        assert blocks <= 65536 // registers * facts.multiprocessors, (name, knobs)


def test_what_has_no_kernel_is_refused():
    for spec in (spec_of(residual=True), LinearSpec("mxfp4", 264, 512, FLOAT16, experts=8)):
        with pytest.raises(TargetError, match="no kernel for a mxfp4 linear"):
            linear_kernel(spec, target("sm_90a"))
    large = LinearSpec("mxfp4", 8192, 8192, FLOAT16, out_dtype="float16", experts=64)
    assert not function.supported(large)  # 2 GiB of codes: 32 bits do not count them
