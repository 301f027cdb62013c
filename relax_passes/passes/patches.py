"""Write convolutions of patches as products: those whose windows lie side by side.

    conv2d(x [b, c, H, W], weight [o, c, p, q]), strides (p, q), no padding
        -> matmul([b, H / p * W / q, c p q], weight as [c p q, o]), as [b, o, H / p, W / q]

What a vision transformer begins with; GPUs have kernels for products.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from relax_passes.ops import is_op
from relax_passes.rewriting import Context, rewrite


def patches(target: Any) -> tvm.transform.Pass:
    """Make the pass for a target; on CPUs convolutions stay what they are."""

    @tvm.transform.module_pass(opt_level=0, name="Patches")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite(module, _rule) if target.kind.name == "cuda" else module

    return run


def _rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    return _product(ctx, value) if is_op(value, "relax.nn.conv2d") else None


def _product(ctx: Context, call: relax.Call) -> relax.Expr | None:
    x, weight = call.args
    if not _side_by_side(call):
        return None
    (batch, channels, height, width), out = x.ty.shape.values, call.ty.shape.values
    _, _, p, q = (int(n) for n in weight.ty.shape.values)
    rows, columns, k = int(height) // p, int(width) // q, int(channels) * p * q
    apart = ctx.emit(relax.op.reshape(x, [batch, channels, rows, p, columns, q]))
    turned = ctx.emit(relax.op.permute_dims(apart, [0, 2, 4, 1, 3, 5]))
    lines = ctx.emit(relax.op.reshape(turned, [batch * (rows * columns), k]))
    matrix = ctx.emit(relax.op.reshape(weight, [out[1], k]))
    matrix = ctx.emit(relax.op.permute_dims(matrix))
    y = ctx.emit(relax.op.matmul(lines, matrix, str(call.ty.dtype)))
    y = ctx.emit(relax.op.reshape(y, [batch, rows, columns, out[1]]))
    return relax.op.permute_dims(y, [0, 3, 1, 2])


def _side_by_side(call: relax.Call) -> bool:
    attrs, (x, weight) = call.attrs, call.args
    sizes = [*x.ty.shape.values[1:], *weight.ty.shape.values]
    if not all(isinstance(n, tirx.IntImm) for n in sizes):
        return False
    kernel = [int(n) for n in weight.ty.shape.values[2:]]
    plain = (attrs.data_layout, attrs.kernel_layout) == ("NCHW", "OIHW") and int(attrs.groups) == 1
    still = [int(n) for n in attrs.dilation] == [1, 1] and not any(int(n) for n in attrs.padding)
    whole = all(int(n) % p == 0 for n, p in zip(sizes[1:3], kernel, strict=True))
    return plain and still and whole and [int(n) for n in attrs.strides] == kernel
