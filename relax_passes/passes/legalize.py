"""Lower the project's operators to TensorIR: each call becomes ``call_tir`` of a scheduled kernel.

Kernels come from the schedule registry and are built once for each distinct specification; what
was chosen, and why, is collected in the module attribute ``amx.kernels`` for the manifest.
Operators see M = the product of the leading axes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import reduce
from typing import Any

import tvm
from tvm import relax, tirx

from amx_tvm.errors import TargetError
from relax_passes import ops
from relax_passes.activation import FLOAT32
from relax_passes.chosen import ChosenKernel
from relax_passes.kernels import activations, adapters
from relax_passes.kernels.chain import MOST_ROWS, ChainSpec, Quantization, chains
from relax_passes.kernels.cpu.attention.convert import convert
from relax_passes.kernels.cpu.attention.vector import LANES
from relax_passes.kernels.registry import Kernel, chain_kernel, linear_kernel, row_kernels
from relax_passes.ops import is_op
from relax_passes.passes.chains import Chain, find_chains
from relax_passes.rewriting import ROWS, Context, marked, rewrite
from relax_passes.spec import LinearSpec

ATTRIBUTE = "amx.kernels"
ON_ROWS = ("layer_norm", "gelu", "gelu_tanh")  # operators of TVM's that have kernels on rows


def legalize(target: Any, records: Any = None) -> tvm.transform.Pass:
    """Make the pass for a target.

    Parameters
    ----------
    target : tvm.target.Target
        What the kernels are made for.
    records : callable, optional
        LinearSpec -> knobs of a tuning record, or None where there is none.
    """

    @tvm.transform.module_pass(opt_level=0, name="LegalizeQuantized")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        lowering = _Lowering(target, records)
        module = rewrite(module, lowering.rule)
        return module.with_attr(ATTRIBUTE, json.dumps(lowering.report))

    return run


def kernels_of(module: tvm.IRModule) -> list[dict[str, Any]]:
    """Return the kernel report of a legalized module: one entry a linear and its rows."""
    attrs = module.attrs
    return json.loads(str(attrs[ATTRIBUTE])) if attrs is not None and ATTRIBUTE in attrs else []


class _Lowering:
    """State of one run: the functions built so far and the report."""

    def __init__(self, target: Any, records: Any) -> None:
        self.target, self.records = target, records
        self.functions: dict[Any, tvm.ir.GlobalVar] = {}
        self.chosen: dict[LinearSpec, dict[str, Any]] = {}
        self.report: list[dict[str, Any]] = []
        self.reported: set[tuple] = set()
        self.chains_of: relax.Function | None = None
        self.chains: dict[relax.Var, Chain] = {}
        self.inside: set[relax.Var] = set()

    def rule(self, ctx: Context, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if ctx.function is not self.chains_of:
            self.chains_of, self.chains, self.inside = ctx.function, {}, set()
            for found in self.find_chains(ctx.function):
                self.chains[found.linears[-1]] = found
                self.inside.update(found.inside)
        if var in self.inside:
            return None  # nothing reads it when the chain's last linear has been lowered
        if var in self.chains:
            return self.chain(ctx, self.chains[var], value)
        if is_op(value, "amx.linear"):
            return self.linear(ctx, ops.Linear.of(value), value.ty)
        if is_op(value, "amx.quantize_activation"):
            return self.quantize(ctx, value)
        if is_op(value, "amx.embedding"):
            return self.embedding(ctx, value)
        if is_op(value, "amx.adapter_down") or is_op(value, "amx.adapter_up"):
            return self.adapter(ctx, value)
        if is_op(value, "relax.astype") and self.target.kind.name == "llvm":
            return self.convert(ctx, value)
        if is_op(value, "relax.nn.rms_norm") and self.target.kind.name in ("llvm", "cuda"):
            return self.rms_norm(ctx, value)
        if any(is_op(value, f"relax.nn.{name}") for name in ON_ROWS):
            return self.on_rows(ctx, value)
        return None

    def function(self, ctx: Context, key: Any, name: str, build: Any) -> tvm.ir.GlobalVar:
        if key not in self.functions:
            self.functions[key] = ctx.add_function(build(), name)
        return self.functions[key]

    def linear(self, ctx: Context, linear: ops.Linear, type_: Any) -> relax.Expr | None:
        attrs = linear.attrs
        if not attrs.layout:
            return plain_matmul(ctx, linear)
        m, static = rows_of(linear.x[0])
        spec = spec_of(linear, static)
        gvar = self.function(ctx, spec, spec_name(spec), lambda: self.kernel(spec))
        self.note(attrs.name, spec)
        lead = len(linear.x[0].ty.shape.values) - 1
        args = [flat(ctx, a, m, lead) for a in linear.x] + list(linear.weights)
        if linear.bias is not None:
            args.append(linear.bias)
        if linear.residual is not None:
            args.append(flat(ctx, linear.residual, m))
        args += [a for a in (linear.source, linear.bounds) if a is not None]
        m = 1 if attrs.joined else m * attrs.gathered if attrs.gathered else m
        out = relax.TensorType([m, spec.out_features], spec.out_dtype)
        return shaped(ctx, relax.call_tir(gvar, args, out), type_)

    def find_chains(self, function: relax.Function) -> list[Chain]:
        """Find the linears that become one kernel."""
        few = marked(function, ROWS) and int(function.attrs[ROWS]) <= MOST_ROWS
        if self.target.kind.name != "llvm" or not few:
            return []
        return find_chains(function, lambda linear: chains(spec_of(linear, None)))

    def chain(self, ctx: Context, found: Chain, last: relax.Call) -> relax.Expr:
        """Lower a chain where its last linear was; what others read of it is replaced."""
        calls = [ctx.value(v) for v in found.linears[:-1]] + [last]
        linears = [ops.Linear.of(call) for call in calls]
        quantized = [ctx.value(v) for v in found.quantized]
        m, static = rows_of(quantized[0].args[0])
        most = None if static else MOST_ROWS
        stages = tuple(replace(spec_of(linear, static), m_max=most) for linear in linears)
        how = tuple(quantization(ops.quantize_attrs(call)) for call in quantized)
        source = quantized[0].args[0].ty.dtype
        spec = ChainSpec(stages, how, source, found.residuals, found.kept, static)
        gvar = self.function(ctx, spec, spec.name, lambda: self.chain_kernel(spec))
        for linear, stage in zip(linears, stages, strict=True):
            self.note(linear.attrs.name, stage, spec.name)
        args = [flat(ctx, quantized[0].args[0], m)]
        for i, linear in enumerate(linears):
            args += [*list(quantized[i].args)[1:], *linear.weights]
            args += [linear.bias] if linear.bias is not None else []
            if linear.residual is not None and found.residuals[i] is None:
                args.append(flat(ctx, linear.residual, m))
        outs = [relax.TensorType([m, s.out_features], s.out_dtype) for _, s in spec.results]
        if len(outs) == 1:
            return shaped(ctx, relax.call_tir(gvar, args, outs[0]), last.ty)
        made = ctx.emit(relax.call_tir(gvar, args, outs))
        items = [relax.TupleGetItem(made, i) for i in range(len(outs))]
        for (i, _), item in zip(spec.results[:-1], items[:-1], strict=True):
            ctx.replace(found.linears[i], ctx.emit(shaped(ctx, item, calls[i].ty)))
        return shaped(ctx, items[-1], last.ty)

    def chain_kernel(self, spec: ChainSpec) -> tvm.tirx.PrimFunc:
        names = []
        for stage in spec.stages:
            names.append(self.records(stage.alone) if self.records is not None else None)
        kernel = chain_kernel(spec, self.target, names)
        why = f"{kernel.why}; in one region with the linears around it"
        for stage, knobs in zip(spec.stages, names, strict=True):
            ranges = row_kernels(stage, self.target, kernel.rule, knobs)
            self.chosen[stage] = chosen(replace(kernel, why=why, rows=ranges), knobs)
        return kernel.func

    def kernel(self, spec: LinearSpec) -> tvm.tirx.PrimFunc:
        recorded = self.records is not None and not spec.experts
        knobs = self.records(spec.alone) if recorded else None
        kernel = linear_kernel(spec, self.target, knobs)
        self.chosen[spec] = chosen(kernel, knobs)
        return kernel.func

    def note(self, name: str, spec: LinearSpec, chain: str = "") -> None:
        if (name, spec.rows) in self.reported:
            return
        self.reported.add((name, spec.rows))
        entry = ChosenKernel(name, spec, **self.chosen[spec], chain=chain)
        self.report.append(entry.to_json())

    def quantize(self, ctx: Context, call: relax.Call) -> relax.Expr:
        attrs = ops.quantize_attrs(call)
        m, static = rows_of(call.args[0])
        source = call.args[0].ty.dtype
        key = (attrs, static, source)
        name = f"{attrs.prologue}_quantize_{attrs.scheme.name}".removeprefix("none_")
        gvar = self.function(
            ctx,
            key,
            f"{name}_k{attrs.k}_{bucket(static)}" + ("_half" if source == "float16" else ""),
            lambda: activations.quantize(static, self.target, source=source, **vars(attrs)),
        )
        args = [flat(ctx, a, m) if len(a.ty.shape.values) > 1 else a for a in call.args]
        parts = ops.activation_parts(attrs)
        outs = [relax.TensorType([m, *shape], dtype) for _, shape, dtype in parts]
        result = relax.call_tir(gvar, args, outs)
        if len(parts) == 1:  # a call with one result has no tuple around it
            return relax.Tuple([ctx.emit(shaped(ctx, result, call.ty.fields[0]))])
        lead = len(call.args[0].ty.shape.values) - 1
        if lead == 1:
            return result
        both = ctx.emit(result)
        pieces = [
            ctx.emit(shaped(ctx, relax.TupleGetItem(both, i), field, lead))
            for i, field in enumerate(call.ty.fields)
        ]
        return relax.Tuple(pieces)

    def embedding(self, ctx: Context, call: relax.Call) -> relax.Expr:
        attrs = ops.embedding_attrs(call)
        ids = call.args[0]
        count = reduce(lambda a, b: a * b, ids.ty.shape.values, tirx.const(1, "int64"))
        static = int(count) if isinstance(count, tirx.IntImm) else None
        gvar = self.function(
            ctx,
            (attrs, static),
            f"embedding_{attrs.format}_k{attrs.k}_{bucket(static)}".replace("-", "_"),
            lambda: activations.embedding(attrs, static, self.target),
        )
        if len(ids.ty.shape.values) != 1:
            ids = ctx.emit(relax.op.reshape(ids, [count]))
        out = relax.TensorType([count, attrs.k], attrs.out_dtype)
        return shaped(ctx, relax.call_tir(gvar, [ids, *call.args[1:]], out), call.ty)

    def adapter(self, ctx: Context, call: relax.Call) -> relax.Expr:
        """Lower the products of rows with their LoRA adapters."""
        attrs, target = ops.adapter_attrs(call), self.target
        weights, k = call.args[-1].ty, int(call.args[0].ty.shape.values[-1])
        count, dtype = int(weights.shape.values[0]), str(weights.dtype)
        if is_op(call, "amx.adapter_down"):
            gvar = self.function(
                ctx,
                ("adapter_down", attrs, k),
                f"adapter_down_k{k}",
                lambda: adapters.down(attrs.parts, k, count, dtype, target),
            )
        else:
            gvar = self.function(
                ctx,
                ("adapter_up", attrs),
                f"adapter_up_n{k}" + ("_silu_mul" if attrs.silu_mul else ""),
                lambda: adapters.up(attrs.parts, count, dtype, attrs.silu_mul, target),
            )
        return relax.call_tir(gvar, list(call.args), call.ty)

    def convert(self, ctx: Context, call: relax.Call) -> relax.Expr | None:
        """Convert rows of heads, as attention takes and gives them, with the cache's kernel."""
        types = (call.args[0].ty.dtype, call.ty.dtype)
        shape = list(call.ty.shape.values)
        static = all(isinstance(s, tirx.IntImm) for s in shape[1:])
        if set(types) != {"float32", "float16"} or len(shape) != 3 or not static:
            return None
        heads, size = (int(s) for s in shape[1:])
        if size % LANES:
            return None
        name = f"convert_{types[1]}_{heads}x{size}"
        gvar = self.function(
            ctx, ("convert", heads, size, types), name, lambda: convert(heads, size, *types)
        )
        return relax.call_tir(gvar, [call.args[0]], call.ty)

    def rms_norm(self, ctx: Context, call: relax.Call) -> relax.Expr | None:
        x, weight = call.args[:2]
        shape = x.ty.shape.values
        axes = [int(a) for a in call.attrs.axes]
        dtype = activations.compute_type(self.target)
        fits = axes in ([-1], [len(shape) - 1]) and x.ty.dtype == dtype
        if not fits or not isinstance(shape[-1], tirx.IntImm):
            return None
        if dtype == "float16" and int(shape[-1]) % activations.ROW_PIECE:
            return None
        m, static = rows_of(x)
        k, eps = int(shape[-1]), float(call.attrs.epsilon)
        gvar = self.function(
            ctx,
            ("rms_norm", k, static, eps),
            f"rms_norm_k{k}_{bucket(static)}",
            lambda: activations.rms_norm(k, static, eps, self.target),
        )
        out = relax.TensorType([m, k], dtype)
        return shaped(ctx, relax.call_tir(gvar, [flat(ctx, x, m), weight], out), call.ty)

    def on_rows(self, ctx: Context, call: relax.Call) -> relax.Expr | None:
        """Lower LayerNorm or GELU of rows; TVM's own use scalar functions, or round in between."""
        x, *weights = call.args
        kind, k = call.op.name.removeprefix("relax.nn."), x.ty.shape.values[-1]
        norm, on_cpu = kind == "layer_norm", self.target.kind.name == "llvm"
        usual = not norm or [int(a) for a in call.attrs.axes] in ([-1], [x.ty.ndim - 1])
        dtype = activations.compute_type(self.target)
        usual &= all(a.ty.dtype == dtype for a in call.args)
        if not (usual and isinstance(k, tirx.IntImm)):
            return None
        # a gate's GELU is one kernel with the product behind it
        gate = isinstance(ctx.value(x), relax.TupleGetItem) and not norm
        if gate and not (on_cpu and kind == "gelu"):
            return None
        if not on_cpu and int(k) % activations.ROW_PIECE:
            return None
        m, static = rows_of(x)
        eps = float(call.attrs.epsilon) if norm else None
        gvar = self.function(
            ctx,
            (kind, int(k), static, eps),
            f"{kind}_k{int(k)}_{bucket(static)}",
            lambda: activations.on_rows(kind, int(k), static, eps, self.target),
        )
        out = relax.TensorType([m, k], dtype)
        return shaped(ctx, relax.call_tir(gvar, [flat(ctx, x, m), *weights], out), call.ty)


def spec_of(linear: ops.Linear, m: int | None) -> LinearSpec:
    """Say what a linear's kernel has to do for M rows of x, any number where ``m`` is None."""
    attrs = linear.attrs
    if m is not None and attrs.gathered:
        m *= attrs.gathered
    if attrs.joined:
        m = 1
    return LinearSpec(
        format=attrs.format,
        n=attrs.n,
        k=attrs.k,
        activation=attrs.activation if attrs.format != "none" else FLOAT32,
        m=m,
        bias=linear.bias is not None,
        residual=linear.residual is not None,
        silu_mul=attrs.silu_mul,
        out_dtype=attrs.out_dtype,
        experts=attrs.experts,
        gathered=attrs.gathered,
        listed=attrs.listed,
        chosen=attrs.chosen,
        over_all=attrs.over_all,
        joined=attrs.joined,
        gate_alpha=attrs.gate_alpha,
        gate_limit=attrs.gate_limit,
    )


def quantization(attrs: ops.QuantizeAttrs) -> Quantization:
    """Say how a quantization in a chain is done."""
    return Quantization(attrs.scheme, attrs.prologue, attrs.eps)


def plain_matmul(ctx: Context, linear: ops.Linear) -> relax.Expr:
    """Write an unquantized linear as Relax's own operators again.

    Raises
    ------
    TargetError
        For a mixture's weights, whose products Relax has no operator for.
    """
    if linear.attrs.experts:
        raise TargetError(
            f"no kernel for the experts {linear.attrs.name} with {linear.attrs.k} input features "
            "on this target; it takes multiples of 8"
        )
    transposed = ctx.emit(relax.op.permute_dims(linear.weights[0]))
    y = relax.op.matmul(linear.x[0], transposed)
    if linear.attrs.out_dtype == "float16":  # sums are of the result's type
        y = ctx.emit(relax.op.matmul(linear.x[0], transposed, "float32"))
        y = relax.op.astype(y, "float16")
    for extra in (linear.bias, linear.residual):
        if extra is not None:
            y = relax.op.add(ctx.emit(y), extra)
    return y


def rows_of(x: relax.Expr) -> tuple[Any, int | None]:
    """Return M, the product of the leading axes, and its value where it is a constant."""
    m = reduce(lambda a, b: a * b, list(x.ty.shape.values)[:-1], tirx.const(1, "int64"))
    m = tvm.sym.Analyzer().simplify(m) if not isinstance(m, tirx.IntImm) else m
    return m, int(m) if isinstance(m, tirx.IntImm) else None


def flat(ctx: Context, x: relax.Expr, m: Any, lead: int | None = None) -> relax.Expr:
    """View [.., K] as [M, K], or [..] of ``lead`` axes as [M]; all axes but the last lead."""
    shape = list(x.ty.shape.values)
    lead = len(shape) - 1 if lead is None else lead
    return x if lead == 1 else ctx.emit(relax.op.reshape(x, [m, *shape[lead:]]))


def shaped(ctx: Context, value: relax.Expr, type_: Any, lead: int | None = None) -> relax.Expr:
    """View a result [M, K], or [M], in the shape that the operator had; the inverse of `flat`."""
    shape = list(type_.shape.values)
    lead = len(shape) - 1 if lead is None else lead
    return value if lead == 1 else relax.op.reshape(ctx.emit(value), shape)


def chosen(kernel: Kernel, knobs: Any) -> dict[str, Any]:
    """Say which kernel a linear got, and which of its parts runs from how many rows of x on."""
    return {
        "kernel": kernel.rule,
        "rows": {r.first: r.kernel for r in kernel.rows},
        "why": kernel.why,
        "record": record_name(knobs),
    }


def record_name(knobs: Any) -> str | None:
    """Say which tuning record the knobs come from; a callable of the user's own has no names."""
    return None if knobs is None else getattr(knobs, "name", f"given: {dict(knobs)}")


def bucket(m: int | None) -> str:
    """Name the rows that a function is for."""
    return "any" if m is None else f"m{m}"


def spec_name(spec: LinearSpec) -> str:
    """Name a linear's function after what it computes."""
    kind = f"experts{spec.experts}" if spec.experts else "linear"
    words = [kind, spec.format, str(spec.activation), f"n{spec.n}", f"k{spec.k}", bucket(spec.m)]
    if spec.epilogue:
        words.append(spec.epilogue)
    name = "_".join(w for w in words if w)
    return "".join(c if c.isalnum() else "_" for c in name)
