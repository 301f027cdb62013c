# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""The most likely token on the GPU: 4 bytes to the host a step instead of the logits.

    best    logits float32 [1, vocab] -> int64 [BLOCKS]: the largest of every block's share
    choose  int64 [BLOCKS] -> token int32 [1, 1]; -1 where logits hold NaN or infinity

Keys order as the logits do and, of equals, put the lower token first: the value's bits, made
monotonic, above the token's complement. NaN is above everything.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .intrinsics import TEXT, at, call

BLOCKS, _THREADS = 128, 256

_ARGMAX = (
    TEXT
    + r"""
#ifndef AMX_ARGMAX
#define AMX_ARGMAX
__device__ __forceinline__ unsigned long long amx_argmax_block(unsigned long long key, void* shared_, int tid) {
  unsigned long long* shared = (unsigned long long*)shared_;
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) {
    const unsigned long long other = __shfl_xor_sync(0xffffffffu, key, mask);
    key = other > key ? other : key;
  }
  if ((tid & 31) == 0) shared[tid >> 5] = key;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < 8; ++w) key = shared[w] > key ? shared[w] : key;
  return key;
}
__device__ __forceinline__ void amx_argmax_best(const void* logits, void* best, int vocab, void* shared, int block, int tid) {
  unsigned long long key = 0ull;
  for (int i = block * 256 + tid; i < vocab; i += 256 * 128) {
    const unsigned b = __float_as_uint(((const float*)logits)[i]);
    const bool nan = (b & 0x7fffffffu) > 0x7f800000u;
    const unsigned order = nan ? 0xffffffffu : (b & 0x80000000u ? ~b : b | 0x80000000u);
    const unsigned long long mine = ((unsigned long long)order << 32) | (0xffffffffu - (unsigned)i);
    key = mine > key ? mine : key;
  }
  key = amx_argmax_block(key, shared, tid);
  if (tid == 0) ((unsigned long long*)best)[block] = key;
}
// order of infinity: 0xff800000
__device__ __forceinline__ void amx_argmax_choose(const void* best, void* token, void* shared, int tid) {
  unsigned long long key = tid < 128 ? ((const unsigned long long*)best)[tid] : 0ull;
  key = amx_argmax_block(key, shared, tid);
  const unsigned order = (unsigned)(key >> 32);
  if (tid == 0) ((int*)token)[0] = order >= 0xff800000u ? -1 : (int)(0xffffffffu - (unsigned)key);
}
#endif
"""
)


def _kernel(name: str, body: Callable, blocks: int) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            body(blocks)
    return builder.get().without_attr("global_symbol")


def _launch(blocks: int, emit: Callable) -> None:
    threads = [
        T.thread_binding(blocks, thread="blockIdx.x"),
        T.thread_binding(_THREADS, thread="threadIdx.x"),
    ]
    with T.frame_scope(threads) as (block, tid):
        with T.sblock("argmax"):
            T.reads()
            T.writes()
            shared = T.sblock_alloc_buffer((8,), "int64", scope="shared")
            T.buffer_store(shared, tirx.const(0, "int64"), [7])
            T.evaluate(T.tvm_storage_sync("shared"))
            emit(shared, block, tid)


def best(vocab: int) -> tirx.PrimFunc:
    """Build the first kernel."""

    def body(blocks: int) -> None:
        logits = T.arg("logits", T.Buffer((1, vocab), "float32"))
        out = T.arg("best", T.Buffer((BLOCKS,), "int64"))
        zero, size = tirx.const(0, "int32"), tirx.const(vocab, "int32")

        def emit(shared, block, tid) -> None:  # noqa: ANN001
            args = (at(logits, zero, zero), at(out, 0), size, at(shared, 0), block, tid)
            call("amx_argmax_best", *args, text=_ARGMAX)

        _launch(blocks, emit)

    return _kernel("argmax_best", body, BLOCKS)


def choose() -> tirx.PrimFunc:
    """Build the second kernel."""

    def body(blocks: int) -> None:
        found = T.arg("best", T.Buffer((BLOCKS,), "int64"))
        token = T.arg("token", T.Buffer((1, 1), "int32"))
        zero = tirx.const(0, "int32")

        def emit(shared, _block, tid) -> None:  # noqa: ANN001
            args = (at(found, 0), at(token, zero, zero), at(shared, 0), tid)
            call("amx_argmax_choose", *args, text=_ARGMAX)

        _launch(blocks, emit)

    return _kernel("argmax_choose", body, 1)
