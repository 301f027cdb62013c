"""What an operator of ours is to Relax: a name, a purity and a rule for its type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from tvm import relax
from tvm.ir import Attrs, Op, make_node

# TVM 0.27 has no public way to register an operator from Python; this is the only use of it.
from tvm.ir import _ffi_api as _register

from relax_passes.activation import Activation


@dataclass(frozen=True)
class Operator:
    """An operator; calling it builds a call of it.

    Attributes
    ----------
    name : str
        Such as "amx.linear".
    infer : callable
        The type of a call, given the call and a context.
    """

    name: str
    infer: Callable[[relax.Call, object], relax.Type]

    def __call__(self, args: Sequence[relax.Expr], attrs: Any = None, **values: Any) -> relax.Call:
        """Build a call from arguments and attributes: a dataclass, or numbers and texts by name."""
        made = make_node("ir.DictAttrs", **values) if attrs is None else _node(attrs)
        return relax.Call(_registered(self), list(args), made)


@cache
def _registered(operator: Operator) -> Op:
    """Register an operator once a process and return it."""
    if operator.name not in Op.list_op_names():
        _register.RegisterOp(operator.name, "amx_tvm operator")
        op = Op.get(operator.name)
        op.set_num_inputs(-1)
        op.set_attrs_type_key("ir.DictAttrs")
        op.set_attr("FPurity", True)
        op.set_attr("FInferType", operator.infer)
    return Op.get(operator.name)


def is_op(expr: relax.Expr, name: str) -> bool:
    """Whether an expression is a call of the named operator (``amx.*`` or Relax's own)."""
    return isinstance(expr, relax.Call) and isinstance(expr.op, Op) and expr.op.name == name


def _node(attrs: Any) -> Attrs:
    def plain(value: Any) -> Any:
        if isinstance(value, Activation):
            return str(value)
        return int(value) if isinstance(value, bool) else value

    values = {f.name: plain(getattr(attrs, f.name)) for f in fields(attrs)}
    return make_node("ir.DictAttrs", **values)


def read(kind: Any, call: relax.Call) -> Any:
    """Return a call's attributes as the dataclass that they were made from."""
    casts: dict[Any, Callable] = {
        "bool": bool,
        "int": int,
        "float": float,
        "str": str,
        "Activation": lambda text: Activation.parse(str(text)),
    }
    return kind(**{f.name: casts[f.type](call.attrs[f.name]) for f in fields(kind)})


def lead(expr: relax.Expr) -> list:
    """Return the axes of an expression's shape but the last."""
    return list(expr.ty.shape.values)[:-1]
