"""Operators of LoRA adapters that stay apart: products with A, and with B on top of a linear's."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax

from relax_passes.adapters import Parts

from .base import Operator, lead, read


@dataclass(frozen=True)
class AdapterAttrs:
    """Attributes of both operators; ``sizes`` are those of `Parts`, with commas between."""

    sizes: str
    rank: int
    silu_mul: bool = False

    @property
    def parts(self) -> Parts:
        """How the weight's rows are divided."""
        sizes = tuple(int(size) for size in self.sizes.split(","))
        return Parts(sizes, self.rank, self.silu_mul)

    @staticmethod
    def of(parts: Parts) -> AdapterAttrs:
        """Return the attributes of a weight; interleaved halves are a gate and what it gates."""
        return AdapterAttrs(",".join(map(str, parts.sizes)), parts.rank, parts.interleaved)


def _infer_down(call: relax.Call, _ctx: object) -> relax.Type:
    parts = adapter_attrs(call).parts
    return relax.TensorType([*lead(call.args[0]), parts.down_tiles * 16], "float32")


def _infer_up(call: relax.Call, _ctx: object) -> relax.Type:
    attrs, y = adapter_attrs(call), call.args[0]
    n = attrs.parts.n // 2 if attrs.silu_mul else attrs.parts.n
    return relax.TensorType([*lead(y), n], y.ty.dtype)


ADAPTER_DOWN = Operator("amx.adapter_down", _infer_down)
ADAPTER_UP = Operator("amx.adapter_up", _infer_up)


def adapter_down(
    x: relax.Expr, slots: relax.Expr, a: relax.Expr, attrs: AdapterAttrs
) -> relax.Call:
    """Build a call of ``amx.adapter_down``: x [M, K] -> each row's products with its adapter's A.

    ``slots`` int32 [M] says which adapter a row has, -1 none; the results of those are undefined.
    """
    return ADAPTER_DOWN([x, slots, a], attrs)


def adapter_up(
    y: relax.Expr, t: relax.Expr, slots: relax.Expr, b: relax.Expr, attrs: AdapterAttrs
) -> relax.Call:
    """Build a call of ``amx.adapter_up``: y [M, N] + t B^T, gated where ``silu_mul`` is set."""
    return ADAPTER_UP([y, t, slots, b], attrs)


def adapter_attrs(call: relax.Call) -> AdapterAttrs:
    """Read the attributes of either."""
    return read(AdapterAttrs, call)
