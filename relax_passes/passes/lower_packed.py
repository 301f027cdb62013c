"""Lower ``amx.packed_attention`` and ``amx.mean_rows``, what models of embeddings are made of.

On CPUs a layer's qkv is split and turned by the cache's kernel for that, and each text attends by
itself. On GPUs it is turned where the model does that, and attention reads it as it is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import tvm
from tvm import relax

from amx_tvm.errors import ModelError
from amx_tvm.targets.cuda.target import gpu_of
from relax_passes.attention_spec import NONE, AttentionSpec
from relax_passes.kernels import activations
from relax_passes.kernels.cpu.attention.config import KVCacheConfig
from relax_passes.kernels.cpu.attention.lowering import pad_heads, unpad_heads
from relax_passes.kernels.cpu.attention.packed import packed_attention
from relax_passes.kernels.cpu.attention.rotary import split_rotary
from relax_passes.kernels.cpu.attention.vector import VectorTarget
from relax_passes.kernels.cuda.attention import dense
from relax_passes.ops import is_op
from relax_passes.rewriting import Context, rewrite


def lower_packed(target: Any) -> tvm.transform.Pass:
    """Make the pass for a target."""

    @tvm.transform.module_pass(opt_level=0, name="LowerPacked")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        functions: dict[Any, tvm.ir.GlobalVar] = {}

        def function(ctx: Context, key: Any, name: str, build: Any) -> tvm.ir.GlobalVar:
            if key not in functions:
                functions[key] = ctx.add_function(build(), name)
            return functions[key]

        def rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if not (is_op(value, "amx.packed_attention") or is_op(value, "amx.mean_rows")):
                return None
            if is_op(value, "amx.mean_rows"):
                size = int(value.ty.shape.values[1])
                build = partial(activations.mean_rows, size, target)
                means = function(ctx, size, "mean_rows", build)
                return relax.call_tir(means, list(value.args), value.ty)
            return (attend if target.kind.name == "llvm" else attend_on_gpu)(ctx, value)

        def attend_on_gpu(ctx: Context, call: relax.Call) -> relax.Expr:
            spec = replace(AttentionSpec.of(call.attrs), layer=0)
            causal, arch = bool(call.attrs["causal"]), gpu_of(target).arch
            qkv, bounds, positions = call.args
            if not dense.fits(spec.head_dim):
                raise ModelError(
                    f"attention of heads of {spec.head_dim} channels has no kernel on GPUs without "
                    "a cache: expected multiples of 8 up to 256; compile for a CPU"
                )
            if spec.rotation.pairs:
                turned = replace(spec, window=0, scale=1.0)
                turn = function(ctx, turned, "turn_heads", partial(dense.turn, spec))
                qkv = ctx.emit(relax.call_tir(turn, [qkv, positions], qkv.ty))
            key = (replace(spec, rotation=NONE), causal)
            build = partial(dense.texts, spec, causal, arch)
            kernel = function(ctx, key, "attention", build)
            return relax.call_tir(kernel, [qkv, bounds], call.ty)

        def attend(ctx: Context, call: relax.Call) -> relax.Expr:
            spec = replace(AttentionSpec.of(call.attrs), layer=0)
            causal = bool(call.attrs["causal"])
            config, vectors = KVCacheConfig((spec,)), VectorTarget.of(target)
            qkv, bounds, positions = call.args
            if spec.head_dim != config.head_dim:
                qkv = ctx.emit(ctx.call_te(pad_heads, qkv, config.head_dim))
            rows = qkv.ty.shape.values[0]
            heads, kv, d = config.num_heads, config.num_kv_heads, config.head_dim
            shapes = [relax.TensorType([rows, n, d], "float32") for n in (heads, kv, kv)]
            turned = replace(spec, window=0, scale=1.0)
            split = function(ctx, turned, "split_heads", lambda: split_rotary(config, always=True))
            parts = ctx.emit(relax.call_tir(split, [qkv, positions], shapes))
            items = [ctx.emit(relax.TupleGetItem(parts, i)) for i in range(3)]
            key = (replace(spec, rotation=NONE), causal)
            kernel = function(
                ctx, key, "attention", lambda: packed_attention(config, vectors, causal)
            )
            out = relax.call_tir(kernel, [*items, bounds], shapes[0])
            if spec.head_dim != config.head_dim:
                out = ctx.call_te(unpad_heads, ctx.emit(out), spec.head_dim)
            return out

        return rewrite(module, rule)

    return run
