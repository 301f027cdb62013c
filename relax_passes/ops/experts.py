"""Operators of a mixture of experts: routing, grouping, products and their sums."""

from __future__ import annotations

from tvm import relax

from .base import Operator, lead


def _infer_expert_matmul(call: relax.Call, _ctx: object) -> relax.Type:
    x, weight = call.args[:2]
    n = int(weight.ty.shape.values[0]) // int(call.attrs["experts"])
    return relax.TensorType([*lead(x), n], x.ty.dtype)


def _infer_expert_route(call: relax.Call, _ctx: object) -> relax.Type:
    shape = [*lead(call.args[0]), int(call.attrs["chosen"])]
    return relax.TupleType([relax.TensorType(shape, t) for t in ("int32", "float32")])


def _infer_expert_group(call: relax.Call, _ctx: object) -> relax.Type:
    ids = call.args[0].ty
    bounds = relax.TensorType([int(call.attrs["experts"]) + 1], "int32")
    return relax.TupleType([ids, ids, bounds])


def _infer_expert_combine(call: relax.Call, _ctx: object) -> relax.Type:
    y, shares = (a.ty for a in call.args[:2])
    return relax.TensorType([shares.shape.values[0], y.shape.values[1]], y.dtype)


def _infer_clamped_gate(call: relax.Call, _ctx: object) -> relax.Type:
    x = call.args[0].ty
    return relax.TensorType([*lead(call.args[0]), x.shape.values[-1] // 2], x.dtype)


EXPERT_MATMUL = Operator("amx.expert_matmul", _infer_expert_matmul)
EXPERT_ROUTE = Operator("amx.expert_route", _infer_expert_route)
EXPERT_GROUP = Operator("amx.expert_group", _infer_expert_group)
EXPERT_COMBINE = Operator("amx.expert_combine", _infer_expert_combine)
CLAMPED_GATE = Operator("amx.clamped_gate", _infer_clamped_gate)


def expert_matmul(
    x: relax.Expr, weight: relax.Expr, bounds: relax.Expr, bias: relax.Expr | None, experts: int
) -> relax.Call:
    """Build a call of ``amx.expert_matmul``.

    Parameters
    ----------
    x : relax.Expr
        [rows, K], sorted by expert.
    weight : relax.Expr
        [experts * N, K], one expert's rows after another's.
    bounds : relax.Expr
        int32 [experts + 1]: the first row of x of each expert, and the end.
    bias : relax.Expr or None
        [experts * N].
    experts : int
        How many.
    """
    args = [x, weight, bounds] + ([bias] if bias is not None else [])
    return EXPERT_MATMUL(args, experts=experts)


def expert_route(scores: relax.Expr, chosen: int, over_all: bool) -> relax.Call:
    """Build a call of ``amx.expert_route``: scores [rows, experts] -> ids, shares [rows, chosen].

    Shares are the softmax over all experts' scores, or over those of the chosen.
    """
    return EXPERT_ROUTE([scores], chosen=chosen, over_all=int(over_all))


def expert_group(ids: relax.Expr, experts: int) -> relax.Call:
    """Build a call of ``amx.expert_group``: int32 [rows, chosen] -> source, place, bounds.

    ``source`` lists the rows of x, sorted by expert; ``place`` is where each of a row's products
    is; ``bounds`` int32 [experts + 1] are the first of each expert's and the end.
    """
    return EXPERT_GROUP([ids], experts=experts)


def expert_combine(y: relax.Expr, shares: relax.Expr, place: relax.Expr) -> relax.Call:
    """Build a call of ``amx.expert_combine``: y [slots, N] -> [rows, N].

    ``shares`` and ``place`` [rows, chosen] are those of ``amx.expert_route`` and
    ``amx.expert_group``.
    """
    return EXPERT_COMBINE([y, shares, place])


def clamped_gate(x: relax.Expr, alpha: float, limit: float) -> relax.Call:
    """Build a call of ``amx.clamped_gate``: x [.., 2 n], gates in front of ups -> [.., n].

    Gates are at most ``limit``, ups within plus and minus it.
    """
    return CLAMPED_GATE([x], alpha=alpha, limit=limit)
