"""Compute functions of float32 in float16, where that loses little: what GPUs' kernels take.

    products, convolutions, attention    of float16; sums and what is no linear are float32
    sums, exponentials, roots, ...       float32, as everything that is not named below
    what moves or combines elements      float16 as soon as one operand is

Inputs and results keep their types. Weights become float16 parameters: no step converts them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from relax_passes.ops import is_op
from relax_passes.rewriting import SINGLE, marked, num_inputs, relax_functions

WIDE, HALF = "float32", "float16"
_LARGEST = float(np.finfo(np.float16).max)


def _ops(prefix: str, names: str) -> frozenset[str]:
    return frozenset(f"relax.{prefix}{name}" for name in names.split())


PRODUCTS = _ops("", "matmul linear") | _ops(
    "nn.", "conv1d conv2d conv3d conv2d_transpose attention attention_bias"
)
# Norms compute in float32 inside, activations of one element too.
FOLLOWING = (
    _ops("", "add subtract multiply maximum minimum negative abs where clip")
    | _ops("", "reshape permute_dims expand_dims squeeze flatten concat split stack strided_slice")
    | _ops("", "take broadcast_to repeat tile flip gather_elements layout_transform")
    | _ops("nn.", "relu gelu gelu_tanh silu leakyrelu layer_norm rms_norm pad max_pool2d")
)


def half_precision(target: Any) -> tvm.transform.Pass:
    """Make the pass for a target, for functions that say `SINGLE`; CPUs compute in float32."""

    @tvm.transform.module_pass(opt_level=0, name="HalfPrecision")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        found = [x for x in relax_functions(module) if marked(x[1], SINGLE)]
        if target.kind.name != "cuda" or not found:
            return module
        updated = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        for gvar, function in found:
            updated[gvar] = _Rewriter(relax.BlockBuilder(module)).function(function)
        return relax.transform.Normalize()(updated)

    return run


class _Rewriter:
    """State of one function: what its variables have become, and bindings to be placed."""

    def __init__(self, builder: relax.BlockBuilder) -> None:
        self._builder = builder
        self._known: dict[relax.Var, relax.Expr] = {}
        self._weights: set[relax.Expr] = set()  # and those transposed
        self._bindings: list[relax.Binding] = []
        self._inside: type[relax.Var] = relax.Var  # of what is bound in the block
        self._cast: dict[tuple[relax.Expr, str], relax.Expr] = {}

    def function(self, function: relax.Function) -> relax.Function:
        inputs = num_inputs(function)
        params = [
            param if i < inputs else self._weight(param) for i, param in enumerate(function.params)
        ]
        blocks = []
        for block in function.body.blocks:
            dataflow = isinstance(block, relax.DataflowBlock)
            self._inside = relax.DataflowVar if dataflow else relax.Var
            for binding in block.bindings:
                self._bind(binding)
            blocks.append(type(block)(self._bindings))
            self._bindings, self._cast = [], {}
        self._inside = relax.Var
        body = self._result(function.body.body)
        if self._bindings:
            blocks.append(relax.BindingBlock(self._bindings))
        return relax.Function(
            params,
            relax.SeqExpr(blocks, body),
            function.ret_ty,
            is_pure=function.is_pure,
            attrs=function.attrs,
        )

    def _weight(self, param: relax.Var) -> relax.Var:
        if not _is(param, WIDE):
            return param
        fresh = relax.Var(param.name, relax.TensorType(param.ty.shape, HALF))
        self._known[param] = fresh
        self._weights.add(param)
        return fresh

    def _bind(self, binding: relax.Binding) -> None:
        var, value = binding.var, binding.value
        if isinstance(binding, relax.MatchCast):
            checked = self._as(self._of(value), WIDE) if _is(value, WIDE) else self._of(value)
            self._bindings.append(relax.MatchCast(var, checked, binding.ty))
            return
        if is_op(value, "relax.permute_dims"):
            self._weights |= {var} if value.args[0] in self._weights else set()
        new = self._builder.normalize(self._value(value))
        kind = relax.DataflowVar if isinstance(var, relax.DataflowVar) else relax.Var
        fresh = kind(var.name, new.ty)
        self._known[var] = fresh
        self._bindings.append(relax.VarBinding(fresh, new))

    def _of(self, expr: relax.Expr) -> relax.Expr:
        """Return an expression over the variables that are there now."""
        if isinstance(expr, relax.Var):
            return self._known.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._of(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._of(expr.tuple_value), expr.index)
        return expr

    def _value(self, value: relax.Expr) -> relax.Expr:
        if not isinstance(value, relax.Call):
            return self._of(value)
        args = [self._of(arg) for arg in value.args]
        name = value.op.name if isinstance(value.op, tvm.ir.Op) else ""
        if name in PRODUCTS:
            return self._call(value, args, HALF)
        if name in FOLLOWING:
            half = any(_any(arg, HALF) for arg in args)
            return self._call(value, args, HALF if half else WIDE)
        return self._call(value, args, WIDE)

    def _call(self, call: relax.Call, args: list[relax.Expr], dtype: str) -> relax.Call:
        args = [self._as(arg, dtype) for arg in args]
        if dtype == HALF and call.op.name == "relax.matmul":
            return relax.op.matmul(*args, HALF if call.args[1] in self._weights else WIDE)
        return relax.Call(call.op, args, call.attrs, call.ty_args)

    def _as(self, expr: relax.Expr, dtype: str) -> relax.Expr:
        """Return a tensor, or a tuple of tensors, of a floating type."""
        other = WIDE if dtype == HALF else HALF
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._as(field, dtype) for field in expr.fields])
        if not _is(expr, other):
            return expr
        if isinstance(expr, tvm.ir.expr.Constant):
            values = expr.value.numpy()
            if dtype == HALF:
                values = np.where(np.isinf(values), values, values.clip(-_LARGEST, _LARGEST))
            return relax.const(values.astype(dtype))
        key = (expr, dtype)
        if key not in self._cast:
            self._cast[key] = self._emit(relax.op.astype(expr, dtype))
        return self._cast[key]

    def _emit(self, expr: relax.Expr) -> relax.Var:
        expr = self._builder.normalize(expr)
        var = self._inside("converted", expr.ty)
        self._bindings.append(relax.VarBinding(var, expr))
        return var

    def _result(self, body: relax.Expr) -> relax.Expr:
        found = self._of(body)
        if not isinstance(found.ty, relax.TupleType):
            return self._as(found, WIDE) if _is(body, WIDE) else found
        fields = []
        for i, declared in enumerate(body.ty.fields):
            item = found.fields[i] if isinstance(found, relax.Tuple) else None
            item = item if item is not None else self._emit(relax.TupleGetItem(found, i))
            wide = isinstance(declared, relax.TensorType) and declared.dtype == WIDE
            fields.append(self._as(item, WIDE) if wide else item)
        return self._emit(relax.Tuple(fields))


def _is(expr: relax.Expr, dtype: str) -> bool:
    type_ = getattr(expr, "ty", None)
    return isinstance(type_, relax.TensorType) and str(type_.dtype) == dtype


def _any(expr: relax.Expr, dtype: str) -> bool:
    if isinstance(expr, relax.Tuple):
        return any(_any(field, dtype) for field in expr.fields)
    return _is(expr, dtype)
