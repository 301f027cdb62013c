"""StableHLO operations in Relax: one small function for each, by the operation's name.

What matters for quantization is ``dot_general``: a product with a 2-D right side becomes
``matmul(x, W)`` or ``matmul(x, permute_dims(W))``, which the passes recognize as a linear.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from tvm import relax

from amx_tvm.frontends.importers.stablehlo_gather import gather
from amx_tvm.frontends.importers.stablehlo_operation import Operation
from amx_tvm.frontends.importers.stablehlo_reduce import reduce, reduce_window, sort


def _elementwise(function: Callable) -> Callable[[Operation], Any]:
    return lambda op: function(*op.operands)


def _compare(op: Operation) -> Any:
    direction = op.text("comparison_direction").split()[-1].strip(">")
    known = {
        "EQ": relax.op.equal,
        "NE": relax.op.not_equal,
        "GE": relax.op.greater_equal,
        "GT": relax.op.greater,
        "LE": relax.op.less_equal,
        "LT": relax.op.less,
    }
    sides = op.operands
    floats = str(sides[0].ty.dtype).startswith("float")
    if floats and op.op.operands[0] == op.op.operands[1] and direction in ("EQ", "NE"):
        # How JAX asks for NaN; TVM would simplify x != x to false.
        missing = relax.op.isnan(sides[0])
        return missing if direction == "NE" else relax.op.logical_not(missing)
    if str(sides[0].ty.dtype) == "bool":  # LLVM would compare them as floats
        sides = [relax.op.astype(side, "int8") for side in sides]
    return known[direction](*sides)


def _logic(name: str) -> Callable[[Operation], Any]:
    def build(op: Operation) -> Any:
        return getattr(relax.op, ("logical_" if op.dtype == "bool" else "bitwise_") + name)(
            *op.operands
        )

    return build


def _broadcast(op: Operation) -> Any:
    x, axes = op.operands[0], op.integers("broadcast_dimensions")
    sizes = [int(v) for v in x.ty.shape.values]
    middle = [1] * len(op.shape)
    for axis, size in zip(axes, sizes, strict=True):
        middle[axis] = size
    if axes != sorted(axes):
        raise op.refuse("broadcast_dimensions out of order are not supported")
    x = relax.op.reshape(x, middle) if middle != sizes else x
    return relax.op.broadcast_to(x, op.shape) if middle != op.shape else x


def _slice(op: Operation) -> Any:
    begin, end, steps = (
        op.integers(name) for name in ("start_indices", "limit_indices", "strides")
    )
    return relax.op.strided_slice(op.operands[0], list(range(len(begin))), begin, end, steps)


def _reverse(op: Operation) -> Any:
    x = op.operands[0]
    for axis in op.integers("dimensions"):
        x = relax.op.flip(x, axis)
    return x


def _iota(op: Operation) -> Any:
    axis = int(op.ir.IntegerAttr(op.op.attributes["iota_dimension"]).value)
    line = relax.op.arange(0, op.shape[axis], 1, op.dtype)
    middle = [size if i == axis else 1 for i, size in enumerate(op.shape)]
    return relax.op.broadcast_to(relax.op.reshape(line, middle), op.shape)


def _dot_general(op: Operation) -> Any:
    from jaxlib.mlir.dialects import stablehlo

    numbers = stablehlo.DotDimensionNumbers(op.op.attributes["dot_dimension_numbers"])
    left, right = op.operands
    batch = list(numbers.lhs_batching_dimensions), list(numbers.rhs_batching_dimensions)
    inner = list(numbers.lhs_contracting_dimensions), list(numbers.rhs_contracting_dimensions)
    ranks = [len(side.ty.shape.values) for side in (left, right)]
    if not batch[0] and ranks[1] == 2 and inner[0] == [ranks[0] - 1] and len(inner[1]) == 1:
        return relax.op.matmul(left, right if inner[1] == [0] else relax.op.permute_dims(right))
    sides = []
    for index, side in enumerate((left, right)):
        sizes = [int(v) for v in side.ty.shape.values]
        free = [i for i in range(ranks[index]) if i not in batch[index] + inner[index]]
        parts = [batch[index], free, inner[index]]
        parts = parts if index == 0 else [parts[0], parts[2], parts[1]]
        side = relax.op.permute_dims(side, [axis for part in parts for axis in part])
        lead = [sizes[axis] for axis in batch[index]]
        sides.append(
            relax.op.reshape(side, lead + [prod(sizes[a] for a in part) for part in parts[1:]])
        )
    return relax.op.reshape(relax.op.matmul(*sides), op.shape)


TRANSLATE: dict[str, Callable[[Operation], Any]] = {
    **{
        f"stablehlo.{name}": _elementwise(function)
        for name, function in {
            "abs": relax.op.abs,
            "add": relax.op.add,
            "ceil": relax.op.ceil,
            "cosine": relax.op.cos,
            "divide": relax.op.divide,
            "exponential": relax.op.exp,
            "floor": relax.op.floor,
            "log": relax.op.log,
            "logistic": relax.op.sigmoid,
            "maximum": relax.op.maximum,
            "minimum": relax.op.minimum,
            "multiply": relax.op.multiply,
            "negate": relax.op.negative,
            "power": relax.op.power,
            "remainder": relax.op.mod,
            "rsqrt": relax.op.rsqrt,
            "select": relax.op.where,
            "sign": relax.op.sign,
            "sine": relax.op.sin,
            "sqrt": relax.op.sqrt,
            "subtract": relax.op.subtract,
            "tanh": relax.op.tanh,
        }.items()
    },
    "chlo.erf": _elementwise(relax.op.erf),
    "stablehlo.and": _logic("and"),
    "stablehlo.or": _logic("or"),
    "stablehlo.not": _logic("not"),
    "stablehlo.broadcast_in_dim": _broadcast,
    "stablehlo.clamp": lambda op: relax.op.minimum(
        relax.op.maximum(op.operands[1], op.operands[0]), op.operands[2]
    ),
    "stablehlo.compare": _compare,
    "stablehlo.concatenate": lambda op: relax.op.concat(
        op.operands, int(op.ir.IntegerAttr(op.op.attributes["dimension"]).value)
    ),
    "stablehlo.convert": lambda op: relax.op.astype(op.operands[0], op.dtype),
    "stablehlo.dot_general": _dot_general,
    "stablehlo.gather": gather,
    "stablehlo.iota": _iota,
    "stablehlo.reduce": reduce,
    "stablehlo.reduce_window": reduce_window,
    "stablehlo.reshape": lambda op: relax.op.reshape(op.operands[0], op.shape),
    "stablehlo.reverse": _reverse,
    "stablehlo.slice": _slice,
    "stablehlo.sort": sort,
    "stablehlo.transpose": lambda op: relax.op.permute_dims(
        op.operands[0], op.integers("permutation")
    ),
}
