"""Put the quantization of activations in front of the linears, once an input, fused with its maker.

A linear whose activations are not exact reads ``amx.quantize_activation(x)``. All linears of one
input share it. What they are computed as depends on x's type (``Activation.computed_in``) and on
the instruction set (``cpu.linear.rules.read_as``). Where x is an RMSNorm, silu(gate) * up, or on
CPUs GELU, that becomes the prologue: one pass over the row normalizes (or gates) and quantizes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

from relax_passes.activation import Scheme
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu.linear.rules import read_as
from relax_passes.ops import Linear, QuantizeAttrs, activation_parts, is_op, quantize_activation
from relax_passes.rewriting import Context, rewrite
from relax_passes.spec import LinearSpec

_ALONE = {"relax.nn.gelu": "gelu", "relax.nn.gelu_tanh": "gelu_tanh"}
_GATES = {"relax.nn.silu": "silu_mul", "relax.nn.gelu": "gelu_mul"}


def needs_sums(linear: Linear) -> bool:
    """Whether a weight format's products need the sum of the activation codes a group."""
    a = linear.attrs
    return LinearSpec(a.format, a.n, a.k, a.activation).needs_sums


def quantize_activations(target: Any) -> tvm.transform.Pass:
    """Make the pass for a target, which inserts and shares the quantization of activations."""
    info = TargetInfo.of(target)

    @tvm.transform.module_pass(opt_level=0, name="QuantizeActivations")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        shared: dict[tuple, list[relax.Expr]] = {}

        def rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if not is_op(value, "amx.linear"):
                return None
            linear = Linear.of(value)
            given = linear.attrs.activation
            if given.exact or linear.attrs.format == "none" or len(linear.x) != 1:
                return None
            x = linear.x[0]
            scheme = read_as(given.computed_in(str(x.ty.dtype)), info)
            linear = replace(linear, attrs=replace(linear.attrs, activation=scheme))
            if scheme.exact:
                return linear.call()
            sums = x.ty.dtype != "float16" and needs_sums(linear)
            key = (x, scheme, sums)
            beside = scheme.scheme is Scheme.E4M3  # few rows are multiplied as they are
            if key not in shared:
                args, attrs = [x], QuantizeAttrs(scheme, linear.attrs.k, sums)
                if not beside:
                    args, attrs = _prologue(ctx, x, attrs)
                parts = ctx.emit(quantize_activation(args, attrs), "quantized")
                count = len(activation_parts(attrs))
                shared[key] = [ctx.emit(relax.TupleGetItem(parts, i), "part") for i in range(count)]
            return replace(linear, x=(*([x] if beside else ()), *shared[key])).call()

        return rewrite(module, rule)

    return run


def _prologue(
    ctx: Context, x: relax.Expr, attrs: QuantizeAttrs
) -> tuple[list[relax.Expr], QuantizeAttrs]:
    """Fold the producer of x into its quantization where nothing but linears reads x."""
    maker = ctx.value(x)
    if is_op(maker, "relax.nn.rms_norm") and _last_axis(maker):
        eps = float(maker.attrs.epsilon)
        return list(maker.args), replace(attrs, prologue="rms_norm", eps=eps)
    if is_op(maker, "relax.multiply"):
        for a, b in (maker.args, reversed(maker.args)):
            gate = ctx.value(a)
            found = next((op for op in _GATES if is_op(gate, op)), None)
            on_cpu = found != "relax.nn.gelu" or x.ty.dtype == "float32"
            if found and on_cpu and tvm_ffi.structural_equal(a.ty, b.ty):
                return [gate.args[0], b], replace(attrs, prologue=_GATES[found])
    alone = next((op for op in _ALONE if is_op(maker, op)), None)
    if alone and x.ty.dtype == "float32":
        return [maker.args[0]], replace(attrs, prologue=_ALONE[alone])
    return [x], attrs


def _last_axis(norm: relax.Call) -> bool:
    axes = [int(a) for a in norm.attrs.axes]
    return axes in ([-1], [len(norm.args[0].ty.shape.values) - 1])
