# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""The generated kernels of CUDA's cache of few bits, run block by block on the CPU."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from choosing import on_cpu, pointers
from cuda_compiled import cuda_text
from packed_cache import WORK

from amx_tvm.targets.cuda.gpus import gpu
from relax_passes.attention_spec import AttentionSpec
from relax_passes.cache_spec import CacheSpec
from relax_passes.kernels.cuda.attention.kernels import log2_scale
from relax_passes.kernels.cuda.packed_cache import kernels, prefill_text
from relax_passes.kernels.cuda.packed_cache.items import Items
from relax_passes.kernels.cuda.packed_cache.layout import layout_of

ARCH = "sm_90a"
TOKENS = 32  # of a tile of prefill


def functions(specs: tuple[AttentionSpec, ...], spec: CacheSpec, arch: str = ARCH) -> dict:
    """The PrimFuncs of a cache, by name."""
    layout, first = layout_of(spec, specs), specs[0]
    items = Items(first, tuple(sorted({0, first.window})), gpu(arch), layout)
    return {
        "setup": kernels.setup(layout),
        "begin": kernels.begin(items),
        "batch": kernels.batch(first, items),
        "store": kernels.store(first, layout),
        "prefill": kernels.prefill(first, layout, arch),
    }


def library(specs: tuple[AttentionSpec, ...], spec: CacheSpec, folder: Path):
    """Build the kernels for the CPU."""
    layout, first = layout_of(spec, specs), specs[0]
    items = Items(first, tuple(sorted({0, first.window})), gpu(ARCH), layout)
    made = functions(specs, spec)
    code = cuda_text(
        {name: made[name] for name in ("setup", "begin", "batch", "store", "prefill")}, ARCH
    )
    text = code[code.index("#ifndef AMX_") :].replace("#include <cuda_fp16.h>", "")
    text = re.sub(r"extern __shared__ \S+ float (\w+)\[\];", r"float* \1 = shared_of(0);", text)
    text = text.replace("__shared__", "static")
    warps = items.few_warps
    attend, plan = items.attend(first, warps).name, items.plan().name
    put = re.search(r"amx_packed_store_amx_\w+", text)[0]
    sinks = "sinks, " if first.sinks else ""
    group, heads, kv = first.group, first.heads, first.kv_heads
    scales = f"{log2_scale(first)!r}f, {float(first.soft_cap)!r}f"
    tile = f"{layout.numbers}, {layout.place}, {group}, {TOKENS}"
    shape = f"{layout.head_dim}, {spec.newest}, {spec.first}, {layout.place}"
    run = f"""
extern "C" void setup(void* state, void* pages, void* recent, void* told, void* work) {{
  amx_packed_setup(state, pages, recent, told, work);
}}
extern "C" void begin(void* state, int m) {{
  for (int y = 0; y < {-(-layout.layers * kv // 4)}; ++y)
    for (int x = 0; x < m; ++x) {{
      blockIdx = {{x, y, 0}};
      run_team(1, 128, [=](int) {{ begin_kernel((int*)state, m); }});
    }}
  run_team(1, 256, [=](int i) {{ {plan}(state, m, i); }});
}}
extern "C" void batch(void* state, void* qkv, void* sinks, void* out, int layer, int m) {{
  for (int number = 0; number < m + {items.extra(warps)}; ++number)
    for (int head = 0; head < {items.heads.blocks}; ++head)
      run_team(1, {32 * warps}, [=](int i) {{
        {attend}(shared_of(0), qkv, state, {sinks}out, layer, {scales}, number, head, i / 32, i % 32);
      }});
}}
extern "C" void prefill(void* state, void* qkv, void* q, void* k, void* v, void* sinks, void* out, int layer, int m) {{
  for (int row = 0; row < m; ++row)
    run_team(1, {32 * min(8, heads + 2 * kv)}, [=](int i) {{ {put}(qkv, state, q, k, v, row, i / 32, i % 32); }});
  flat = true;
  for (int x = 0; x < (m * {kv * 2 * layout.head_dim // 8} + 127) / 128; ++x) {{
    blockIdx = {{x, 0, 0}};
    run_team(1, 128, [=](int) {{ store_kernel_1((half*)k, (int*)state, (half*)v, layer, m); }});
  }}
  flat = false;
  const int blocks = (m + 63) / 64;
  for (int block = 0; block < blocks; ++block)
    for (int head = 0; head < {heads}; ++head)
      run_team(1, 128, [=](int i) {{
        amx_attend_packed_prefill<{tile}>(shared_of(0), q, k, v, state, {sinks or "nullptr, "}out, layer, {scales}, {first.window}, block, blocks, head, i / 32, i % 32);
      }});
  for (int row = 0; row < m; ++row)
    for (int head = 0; head < {kv}; ++head)
      run_team(1, 64, [=](int i) {{
        amx_packed_remember<{shape}>((AmxPacked*)state, (half*)k, (half*)v, layer, row, m, head, i, 64);
      }});
}}
"""
    header = f'#include "{Path(__file__).parent}/tensor_cores.h"\n'
    assert prefill_text.shared_floats(layout.head_dim, TOKENS) * 4 < 256 << 10
    assert items.bytes <= 4 * WORK
    return Blocks(on_cpu(header + text, run, folder))


class Blocks:
    """Those kernels over arrays of the host."""

    def __init__(self, built: ctypes.CDLL):
        self._built = built

    def hold(self, arrays: tuple) -> None:
        """Keep what the kernels share between calls."""
        self._built.setup(*pointers(*arrays))
        self._state = pointers(arrays[0])[0]

    def begin(self, m: int) -> None:
        self._built.begin(self._state, m)

    def batch(self, qkv, sinks, out, layer: int, m: int) -> None:
        self._built.batch(self._state, *pointers(qkv, sinks, out), layer, m)

    def prefill(self, *given) -> None:
        *arrays, layer, m = given
        self._built.prefill(self._state, *pointers(*arrays), layer, m)
