"""How ``relax.take`` becomes TensorIR: as TVM's own rule does it, without its warning.

TVM prints that its mode "fast" crashes for indices out of bounds whenever it legalizes one, to whom
the indices belong: here to embeddings, whose tokens are checked before, and to importers, which ask
for another mode where a model may go out of bounds. The loops are those of ``topi::take``.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, te


def take(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Legalize one call; other modes than "fast" are left to TVM's rule."""
    axis = call.attrs.axis
    if call.attrs.mode != "fast" or axis is None:
        return tvm.ir.Op.get("relax.take").get_attr("FLegalize")(builder, call)
    return builder.call_te(_take, call.args[0], call.args[1], int(axis), primfunc_name_hint="take")


def _take(data: te.Tensor, indices: te.Tensor, axis: int) -> te.Tensor:
    axis = axis % len(data.shape)
    end = axis + len(indices.shape)
    shape = [*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]]

    def element(*at: Any) -> Any:
        return data(*at[:axis], indices(*at[axis:end]), *at[end:])

    names = [f"ax{i}" for i in range(len(shape))]
    return te.compute(shape, element, name="T_take", tag="injective", varargs_names=names)
