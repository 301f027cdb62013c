"""Reductions, cumulative sums and sorting of StableHLO in Relax.

These operations hold a small function of their own that says how two values become one, or which
of two comes first. The functions that JAX writes are known by their form; any other is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from amx_tvm.frontends.importers.stablehlo_operation import Operation


def reduce(op: Operation) -> Any:
    """Reduce axes: a sum, product, extreme, all, any, or the place of an extreme."""
    if len(op.operands) == 4:
        return _argument_of_extreme(op)
    if len(op.operands) != 2:
        raise op.refuse("a reduction of several arrays at once is not supported")
    axes, x = op.integers("dimensions"), op.operands[0]
    kind = _combination(op)
    if op.dtype == "bool" and kind in ("and", "or"):
        function = relax.op.min if kind == "and" else relax.op.max
        return relax.op.astype(function(relax.op.astype(x, "int8"), axes), "bool")
    known = {
        "add": relax.op.sum,
        "maximum": relax.op.max,
        "minimum": relax.op.min,
        "multiply": relax.op.prod,
    }
    if kind not in known:
        raise op.refuse(f"a reduction with {kind} is not supported")
    # JAX starts reductions with the operation's neutral element, so the start is left out.
    return known[kind](x, axes)


def _combination(op: Operation) -> str:
    """Return the only operation of a region, without its dialect."""
    steps = [str(o.operation.name) for o in op.op.regions[0].blocks[0].operations]
    names = [step.partition(".")[2] for step in steps[:-1]]
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"


def _argument_of_extreme(op: Operation) -> list[Any]:
    """JAX's argmax and argmin: values and their positions; the first NaN wins, as in NumPy."""
    axes = op.integers("dimensions")
    block = op.op.regions[0].blocks[0]
    steps = [str(o.operation.name).partition(".")[2] for o in block.operations]
    form = ["compare", "compare", "or", "compare", "compare", "and", "or", "select", "select"]
    first = next(iter(block.operations))
    positions = op.op.operands[1].owner
    counted = str(getattr(positions, "name", "")) == "stablehlo.iota" and len(axes) == 1
    if steps != [*form, "return"] or not counted:
        raise op.refuse("a reduction of several arrays at once is not supported, but for argmax")
    axis = int(op.ir.IntegerAttr(positions.attributes["iota_dimension"]).value)
    direction = _direction(first)
    if axis != axes[0] or direction not in ("GT", "LT"):
        raise op.refuse("a reduction of several arrays at once is not supported, but for argmax")
    x = op.operands[0]
    index_type = str(op.operands[1].ty.dtype)
    place, value = (
        (relax.op.argmax, relax.op.max) if direction == "GT" else (relax.op.argmin, relax.op.min)
    )
    index = place(x, axis)
    if str(x.ty.dtype).startswith("float"):
        missing = relax.op.astype(relax.op.isnan(x), "float32")
        found = relax.op.max(missing, axis)
        none = relax.op.equal(found, relax.const(0.0, "float32"))
        index = relax.op.where(none, index, relax.op.argmax(missing, axis))
    return [value(x, axis), relax.op.astype(index, index_type)]


def reduce_window(op: Operation) -> Any:
    """Cumulative sums and products, which JAX writes as windows as long as the axis."""
    x = op.operands[0]
    sizes = [int(v) for v in x.ty.shape.values]
    window = op.integers("window_dimensions")
    padding = np.array(op.op.attributes["padding"]).reshape(-1, 2).tolist()
    for name in ("window_strides", "base_dilations", "window_dilations"):
        if name in op.op.attributes and set(op.integers(name)) != {1}:
            raise op.refuse(f"{name} other than 1 are not supported")
    axes = [i for i, (size, span) in enumerate(zip(sizes, window, strict=True)) if span > 1]
    known = {"add": relax.op.cumsum, "multiply": relax.op.cumprod}
    kind = _combination(op)
    if not axes:  # axes of one entry: the window is the entry
        return x
    axis, size = axes[0], sizes[axes[0]]
    plain = all(pad == [0, 0] for i, pad in enumerate(padding) if i != axis)
    ends = padding[axis]
    forward, backward = [size - 1, 0], [0, size - 1]
    if len(axes) > 1 or window[axis] != size or not plain or ends not in (forward, backward):
        raise op.refuse("only windows of a cumulative sum or product are supported")
    if kind not in known:
        raise op.refuse(f"a cumulative {kind} is not supported")
    if ends == forward:
        return known[kind](x, axis, op.dtype)
    return relax.op.flip(known[kind](relax.op.flip(x, axis), axis, op.dtype), axis)


def sort(op: Operation) -> list[Any]:
    """Sort by the first array; the others follow it. NaN counts as the largest number."""
    axis = int(op.ir.IntegerAttr(op.op.attributes["dimension"]).value)
    order = _order(op)
    if order not in ("LT", "GT"):
        raise op.refuse("only an order by the first array, ascending or descending, is supported")
    key = op.operands[0]
    if str(key.ty.dtype).startswith("float"):
        largest = relax.const(np.inf, str(key.ty.dtype))
        key = relax.op.where(relax.op.isnan(key), largest, key)
    places = relax.op.argsort(key, axis=axis, descending=order == "GT", dtype="int32")
    return [relax.op.gather_elements(x, places, axis=axis) for x in op.operands]


def _order(op: Operation) -> str | None:
    """Return the direction of a comparison of the first array's two values, else None."""
    block = op.op.regions[0].blocks[0]
    *_, last = block.operations
    compared = last.operands[0].owner
    if str(getattr(compared, "name", "")) != "stablehlo.compare":
        return None
    sides = [_plain(compared.operands[side], block) for side in (0, 1)]
    return _direction(compared) if sides == [0, 1] else None


def _plain(value: Any, block: Any) -> int | None:
    """Return which argument a value is, behind the selects by which JAX treats 0 and NaN alike."""
    while True:
        for index, argument in enumerate(block.arguments):
            if value == argument:
                return index
        owner = value.owner
        if str(getattr(owner, "name", "")) != "stablehlo.select":
            return None
        value = owner.operands[2]


def _direction(compare: Any) -> str:
    return str(compare.attributes["comparison_direction"]).split()[-1].strip(">")
