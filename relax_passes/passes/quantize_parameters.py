"""Replace the weight of every annotated linear by the arrays that kernels read, symbolically.

The parts (``codes``, ``scales`` and, for formats with a tensor scale, ``tile_scale``) become
parameters of their own; the plan says how each is made. An embedding table that the policy
quantizes becomes ``amx.embedding``; where the head is tied to it, both read the same parts. A
linear that is not quantized gets the layout of floats that goes with the packed one, one that
multiplies E4M3 the layout for that. Biases are
float32 whatever a model computes in.
"""

from __future__ import annotations

from dataclasses import replace

import tvm
from tvm import relax

from amx_tvm import formats
from amx_tvm.formats import e4m3, packing
from relax_passes import recipes as parameters
from relax_passes.activation import FLOAT16, Scheme
from relax_passes.ops import EmbeddingAttrs, Linear, embedding, is_op
from relax_passes.policy import Policy
from relax_passes.rewriting import Context, rewrite


def _in_e4m3(linear: Linear, layout: str) -> tuple[Linear, str]:
    """Take the layout of E4M3 where a linear has kernels for it, else activations of 16 bits."""
    beside = packing.get_layout(layout).e4m3
    a = linear.attrs
    fits = a.format != "none" and e4m3.holds(formats.get(a.format)) and not a.experts
    if beside and fits and packing.get_layout(beside).holds(a.k, a.out_dtype):
        return linear, beside
    return replace(linear, attrs=replace(a, activation=FLOAT16)), layout


def quantize_parameters(policy: Policy, layout: str) -> tvm.transform.Pass:
    """Make the pass for a policy and the packed layout that the target's kernels read."""

    @tvm.transform.module_pass(opt_level=0, name="QuantizeParameters")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        plan = parameters.read(module)
        beside = packing.get_layout(layout).floats
        floats = packing.get_layout(beside) if beside else None

        def packed(
            ctx: Context, param: relax.Var, format_name: str, layout: str
        ) -> list[relax.Var]:
            n, k = (int(v) for v in param.ty.shape.values)
            recipe = parameters.recipe_of(plan, param.name)
            stem = param.name.removesuffix(".T")
            parts = []
            shapes = packing.part_shapes(format_name, (n, k), layout)
            for part, (shape, dtype) in shapes.items():
                name = f"{stem}.{part}"
                made = replace(recipe, layout=layout, part=part)
                plan[name] = made if format_name == "none" else replace(made, format=format_name)
                parts.append(ctx.parameter(name, relax.TensorType(shape, dtype)))
            return parts

        def wide(ctx: Context, bias: relax.Var) -> relax.Var:
            """Return a bias as kernels read it: float32."""
            if bias.ty.dtype == "float32":
                return bias
            name = f"{bias.name}.float32"
            plan[name] = parameters.recipe_of(plan, bias.name)
            return ctx.parameter(name, relax.TensorType(bias.ty.shape, "float32"))

        def rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if is_op(value, "amx.linear"):
                linear = Linear.of(value)
                if linear.attrs.layout:
                    return None
                chosen = layout
                if linear.attrs.format == "none":
                    if floats is None or not floats.holds(linear.attrs.k, linear.attrs.out_dtype):
                        return None  # stays Relax's own matmul
                    chosen = floats.name
                if linear.attrs.activation.scheme is Scheme.E4M3:
                    linear, chosen = _in_e4m3(linear, layout)
                parts = packed(ctx, linear.weights[0], linear.attrs.format, chosen)
                attrs = replace(linear.attrs, layout=chosen)
                bias = wide(ctx, linear.bias) if linear.bias is not None else None
                return replace(linear, attrs=attrs, weights=tuple(parts), bias=bias).call()
            if is_op(value, "relax.take") and ctx.is_weight(value.args[0]):
                table, ids = value.args
                format_name = policy.table(table.name.removesuffix(".weight"))
                axis = value.attrs.axis
                shape = [int(v) for v in table.ty.shape.values]
                # a table in another layout stays as it is
                readable = format_name != "none" and packing.get_layout(layout).rows_readable
                if not readable or len(shape) != 2 or axis is None or int(axis) != 0:
                    return None
                rows, k = shape
                lookup = EmbeddingAttrs(rows, k, format_name, layout, str(value.ty.dtype))
                return embedding(ids, packed(ctx, table, format_name, layout), lookup)
            return None

        return parameters.write(rewrite(module, rule), plan)

    return run
