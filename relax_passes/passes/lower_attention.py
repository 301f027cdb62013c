"""Lower ``amx.kv_cache`` and ``amx.attention`` for the target.

    CPU    calls of TVM's cache object, which get this project's kernels when it is made; kernels
           of their own where keys and values are stored in few bits
    CUDA   this project's kernels, with the cache's state as a parameter; others where keys and
           values are stored in few bits

Models say only what is computed; which functions rotate, what is converted and what travels beside
the cache is decided here and in the packages of the kernels.
"""

from __future__ import annotations

from typing import Any, Protocol

import tvm
from tvm import relax

from relax_passes.attention_spec import AttentionSpec, CacheStorage
from relax_passes.kernels.cpu.attention.config import KVCacheConfig
from relax_passes.kernels.cpu.attention.lowering import CpuAttention
from relax_passes.kernels.cpu.packed_cache.lowering import PackedAttention
from relax_passes.kernels.cuda.attention.lowering import CudaAttention
from relax_passes.kernels.cuda.packed_cache.lowering import PackedCudaAttention
from relax_passes.ops import Attention, is_op
from relax_passes.rewriting import Context, relax_functions, rewrite


class Lowering(Protocol):
    """How a target does the attention of one model."""

    def begin(self, ctx: Context, rows: Any, cache: relax.Expr) -> None:
        """Emit what stands in front of a function with attention, of so many rows."""
        ...

    def cache(self, ctx: Context, sizes: relax.ShapeExpr) -> relax.Expr:
        """Return a tuple: TVM's object, and what else every function takes behind it."""
        ...

    def attend(self, ctx: Context, asked: Attention) -> relax.Expr:
        """Return the attention of one layer."""
        ...


def lower_attention(target: Any, storage: CacheStorage) -> tvm.transform.Pass:
    """Make the pass for a target and a way of keeping keys and values."""

    @tvm.transform.module_pass(opt_level=0, name="LowerAttention")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        specs = specs_of(module)
        if not specs:
            return module
        return lowered(module, lowering(specs, target, storage))

    return run


def lowered(module: tvm.IRModule, how: Lowering) -> tvm.IRModule:
    """Return the module with its caches and attention done in a way."""
    begun: list[relax.Function] = []

    def rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if not begun or begun[-1] is not ctx.function:
            begun.append(ctx.function)
            calls = _calls(ctx.function)
            if calls:
                how.begin(ctx, calls[0].rows, calls[0].cache)
        if is_op(value, "amx.kv_cache"):
            return how.cache(ctx, value.args[0])
        if is_op(value, "amx.attention"):
            return how.attend(ctx, Attention.of(value))
        return None

    return rewrite(module, rule)


def lowering(specs: tuple[AttentionSpec, ...], target: Any, storage: CacheStorage) -> Lowering:
    """Choose how a target does the attention of these layers."""
    on_cpu = target.kind.name == "llvm"
    if storage.packed is not None:
        return (PackedAttention if on_cpu else PackedCudaAttention)(specs, target, storage.packed)
    if on_cpu:
        config = KVCacheConfig(specs, storage.dtype or "float32", storage.format)
        return CpuAttention(config, target)
    return CudaAttention(specs, target)


def specs_of(module: tvm.IRModule) -> tuple[AttentionSpec, ...]:
    """Return the attention of every layer of a module, in order."""
    found = {}
    for _, function in relax_functions(module):
        for call in _calls(function):
            found[call.spec.layer] = call.spec
    return tuple(found[layer] for layer in sorted(found))


def _calls(function: relax.Function) -> list[Attention]:
    values = (b.value for block in function.body.blocks for b in block.bindings)
    return [Attention.of(value) for value in values if is_op(value, "amx.attention")]
