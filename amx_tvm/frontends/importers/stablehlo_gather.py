"""StableHLO's gather in Relax, in the forms that indexing with arrays takes.

    take              x[:, i, :]      one axis, whole slices of the others
    take_along_axis   x[b, i[b, j]]   one axis, every other one a batch
    gather_nd         x[i, j, :]      leading axes together

Indices outside are moved to the border, as the operation defines it; the other modes of
``jnp.take`` ("fill", "wrap") are operations around it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from amx_tvm.frontends.importers.stablehlo_operation import Operation


def gather(op: Operation) -> Any:
    """Translate one gather."""
    from jaxlib.mlir.dialects import stablehlo

    table, indices = op.operands
    numbers = stablehlo.GatherDimensionNumbers(op.op.attributes["dimension_numbers"])
    sizes, spans = [int(v) for v in table.ty.shape.values], op.integers("slice_sizes")
    lead = [int(v) for v in indices.ty.shape.values]
    if numbers.index_vector_dim == len(lead):  # every index is a vector of one
        lead = [*lead, 1]
        indices = relax.op.reshape(indices, lead)
    axes, offsets = list(numbers.start_index_map), list(numbers.offset_dims)
    batches = list(numbers.operand_batching_dims)
    others = [axis for axis in range(len(sizes)) if axis not in axes + batches]
    simple = (
        numbers.index_vector_dim == len(lead) - 1
        and lead[-1] == len(axes)
        and sorted(numbers.collapsed_slice_dims) == sorted(axes)
        and all(spans[axis] == 1 for axis in axes + batches)
        and all(spans[axis] == sizes[axis] for axis in others)
    )
    if not simple:
        raise op.refuse("only whole slices at indexed positions are supported")
    limits = np.array([sizes[axis] - 1 for axis in axes], str(indices.ty.dtype))
    zero = relax.const(0, str(indices.ty.dtype))
    inside = relax.op.minimum(relax.op.maximum(indices, zero), relax.const(limits))
    if batches:
        if others or len(axes) > 1 or list(numbers.start_indices_batching_dims) != batches:
            raise op.refuse("only take_along_axis is supported among batched gathers")
        return relax.op.gather_elements(table, relax.op.reshape(inside, lead[:-1]), axis=axes[0])
    count = len(lead) - 1  # axes of the result that come from the indices
    if len(axes) == 1:
        axis = axes[0]
        found = relax.op.take(table, relax.op.reshape(inside, lead[:-1]), axis=axis)
    elif axes == list(range(len(axes))):
        axis, found = 0, relax.op.gather_nd(table, relax.op.astype(inside, "int64"))
    else:
        raise op.refuse("only leading axes can be indexed together")
    # `found` has the axes in front of `axis`, then those of the indices, then the rest.
    rank = count + len(offsets)
    batch = [i for i in range(rank) if i not in offsets]
    made = offsets[:axis] + batch + offsets[axis:]
    order = [made.index(i) for i in range(rank)]
    return found if order == list(range(rank)) else relax.op.permute_dims(found, order)
