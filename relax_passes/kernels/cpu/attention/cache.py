"""The paged KV cache of CPU targets: TVM's runtime object with this package's kernels.

``vm.builtin.paged_attention_kv_cache_create`` takes its kernels as arguments and treats pages as
opaque, so the kernels are free to choose their layout (see :mod:`.config`).  Differences from
``TIRPagedKVCache``:

* token trees are not supported (their kernels are left out, and the runtime refuses them);
* sliding windows belong to layers, and kernels compare positions; the runtime's own windows are
  switched off: it would cut each list of a fork's pages by itself, and its other mode, a window per
  sequence with attention sinks, would rotate inside attention.
"""

from __future__ import annotations

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.frontend.nn.llm.kv_cache import AttnKind, RopeMode

from relax_passes.rewriting import Context

from . import decode, merge, pages, prefill, rotary
from .config import KVCacheConfig
from .quantized import quantized_attention
from .vector import VectorTarget


def kernels(config: KVCacheConfig, target) -> dict[str, tirx.PrimFunc]:  # noqa: ANN001
    """Build all kernels of a cache, by name.

    Parameters
    ----------
    config : KVCacheConfig
        The cache they are for.
    target : Target, dict, TargetInfo or VectorTarget
        The target, or only its vector registers.

    Returns
    -------
    dict of str to PrimFunc
        append, prefill_ragged, prefill_paged, decode, merge_state, split_rotary,
        copy_single_page, debug_get_kv, compact_copy.
    """
    vt = target if isinstance(target, VectorTarget) else VectorTarget.of(target)
    if config.quantize:
        attend = {
            "prefill_ragged": quantized_attention(config, "ragged"),
            "prefill_paged": quantized_attention(config, "paged"),
            "decode": quantized_attention(config, "decode"),
        }
    else:
        attend = {
            "prefill_ragged": prefill.ragged_prefill(config, vt),
            "prefill_paged": prefill.paged_prefill(config, vt),
            "decode": decode.decode_attention(config, vt),
        }
    return {
        "append": pages.append(config),
        **attend,
        "merge_state": merge.merge_state(config),
        "split_rotary": rotary.split_rotary(config),
        "copy_single_page": pages.copy_single_page(config),
        "debug_get_kv": pages.debug_get_kv(config),
        "compact_copy": pages.compact_copy(config),
    }


def create(ctx: Context, config: KVCacheConfig, sizes: rx.ShapeExpr, target) -> rx.Expr:  # noqa: ANN001
    """Create the cache object in the function that is being rewritten.

    Parameters
    ----------
    ctx : Context
        The function, which gets the kernels' names, and its module, which gets the kernels.
    config : KVCacheConfig
        The layers, and how they are stored.
    sizes : ShapeExpr
        Most sequences, tokens of all sequences, tokens of one forward pass.
    target : Target, dict, TargetInfo or VectorTarget
        What the kernels are made for: its vector registers.
    """
    functions = {
        name: ctx.add_function(function, f"kv_cache_{name}")
        for name, function in kernels(config, target).items()
    }

    def backend(name: str) -> rx.Expr:
        if name not in functions:
            return rx.Tuple([])
        return rx.Tuple([tvm.ir.StringImm("tirx"), functions[name]])

    kinds = [int(AttnKind.MHA)] * config.layers
    no_windows = (0, 1)  # a sequence's, layers'
    arguments = [
        rx.ShapeExpr([*sizes.values, config.page_size, *no_windows]),
        rx.ShapeExpr([0, config.layers]),
        rx.prim_value(config.num_heads),
        rx.prim_value(config.num_kv_heads),
        rx.prim_value(config.head_dim),
        rx.prim_value(config.head_dim),
        rx.ShapeExpr(kinds),
        rx.prim_value(False),  # no disaggregation
        rx.prim_value(int(RopeMode.NORMAL if config.rotation.pairs else RopeMode.NONE)),
        rx.prim_value(1),  # rope scale and theta are used by rotation inside attention only
        rx.prim_value(10000.0),
        rx.prim_value(0),  # no extension factors: the frequencies are constants of split_rotary
        rx.const(0.0, config.dtype),
        functions["append"],
        rx.prim_value(0),  # no MLA append
        backend("prefill_ragged"),
        backend("prefill_paged"),
        backend("decode"),
        rx.Tuple([]),  # no kernels of sliding layers' own
        rx.Tuple([]),
        rx.Tuple([]),  # no token trees
        rx.Tuple([]),
        rx.Tuple([]),  # no MLA prefill
        rx.Tuple([functions["merge_state"]]),
        functions["split_rotary"],
        functions["copy_single_page"],
        functions["debug_get_kv"],
        functions["compact_copy"],
    ]
    return rx.call_pure_packed(
        "vm.builtin.paged_attention_kv_cache_create", *arguments, ty_args=rx.AnyType()
    )
