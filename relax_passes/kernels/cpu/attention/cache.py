"""The paged KV cache of CPU targets: TVM's runtime object with this package's kernels.

``vm.builtin.paged_attention_kv_cache_create`` takes its kernels as arguments and treats pages as
opaque, so the kernels are free to choose their layout (see :mod:`.config`).  Differences from
``TIRPagedKVCache``:

* token trees are not supported (their kernels are left out, and the runtime refuses them);
* sliding windows belong to layers ("mha_sliding"), with rotary embeddings in the cache; the
  runtime's other mode, a window per sequence with attention sinks, would rotate inside attention
  and is switched off.  A forked sequence must not be longer than the window.
"""

from __future__ import annotations

import tvm
from tvm import relax as rx
from tvm import tirx
from tvm.relax.frontend.nn import Tensor
from tvm.relax.frontend.nn.llm.kv_cache import AttnKind, PagedKVCache, RopeMode

from . import decode, merge, pages, prefill, rotary
from .config import KVCacheConfig
from .quantized import quantized_attention
from .vector import VectorTarget


class CpuPagedKVCache(PagedKVCache):
    """A paged KV cache whose kernels are vectorized and parallel.

    Construct it inside an ``nn.Module`` method while it is exported (``create_kv_cache``).

    Parameters
    ----------
    config : KVCacheConfig
        Shape, rotary embedding and storage.
    max_batch_size, max_total_seq_len, prefill_chunk_size : tirx.Var or int
        Capacity: sequences, tokens of all sequences, tokens of one forward pass.
    target : Target, dict, TargetInfo or VectorTarget
        What the kernels are made for: its vector registers.
    name : str
        Name of the Relax variable.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        max_batch_size: tirx.Var,
        max_total_seq_len: tirx.Var,
        prefill_chunk_size: tirx.Var,
        target,  # noqa: ANN001
        name: str = "paged_kv_cache",
    ) -> None:
        capacity = (max_batch_size, max_total_seq_len, prefill_chunk_size)
        super().__init__(
            _expr=rx.call_pure_packed(
                "vm.builtin.paged_attention_kv_cache_create",
                *_arguments(config, capacity, target),
                ty_args=rx.AnyType(),
            ),
            _name=name,
        )


def attention(
    cache: PagedKVCache, config: KVCacheConfig, layer: int, qkv: Tensor, sm_scale: float
) -> Tensor:
    """Rotate, append and attend with the fused qkv of one layer.

    Use this rather than ``attention_with_fused_qkv``: it converts to the cache's type and back,
    and marks sliding layers.

    Parameters
    ----------
    cache : PagedKVCache
        The cache object (also one that came in as a function parameter).
    config : KVCacheConfig
        The configuration it was made with.
    layer : int
        Index of the decoder layer.
    qkv : Tensor
        [batch, tokens, heads + 2 kv_heads, head_dim], float32.
    sm_scale : float
        Positive factor on the scores before the softmax.

    Returns
    -------
    Tensor
        [batch, tokens, heads, head_dim], of qkv's type.
    """
    scale = -sm_scale if config.kinds[layer] == "mha_sliding" else sm_scale
    dtype = qkv.dtype
    converted = qkv if dtype == config.dtype else qkv.astype(config.dtype)
    out = cache.attention_with_fused_qkv(layer, converted, config.num_heads, scale)
    return out if dtype == config.dtype else out.astype(dtype)


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
        copy_single_page, debug_get_kv, compact_copy, and with sliding layers also
        prefill_paged_sliding and decode_sliding.
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
    result = {
        "append": pages.append(config),
        **attend,
        "merge_state": merge.merge_state(config),
        "split_rotary": rotary.split_rotary(config),
        "copy_single_page": pages.copy_single_page(config),
        "debug_get_kv": pages.debug_get_kv(config),
        "compact_copy": pages.compact_copy(config),
    }
    if config.window:
        result["prefill_paged_sliding"] = prefill.paged_prefill(config, vt, sliding=True)
        result["decode_sliding"] = decode.decode_attention(config, vt, sliding=True)
    return result


def _arguments(config: KVCacheConfig, capacity: tuple, target) -> list:  # noqa: ANN001
    """Arguments of the runtime's constructor, in its order."""
    builder = rx.BlockBuilder.current()
    functions = {
        name: builder.add_func(function, f"kv_cache_{name}")
        for name, function in kernels(config, target).items()
    }

    def backend(name: str) -> rx.Expr:
        if name not in functions:
            return rx.Tuple([])
        return rx.Tuple([tvm.ir.StringImm("tirx"), functions[name]])

    kinds = [int(getattr(AttnKind, kind.upper())) for kind in config.kinds]
    if "mha" not in config.kinds:
        # The runtime allocates its buffers for q, k and v only where some layer is plain MHA;
        # an entry beyond the last layer says so without being used.
        kinds.append(int(AttnKind.MHA))
    per_sequence_window = 0
    return [
        rx.ShapeExpr([*capacity, config.page_size, per_sequence_window, config.window or 1]),
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
        rx.op.zeros((), config.dtype),
        functions["append"],
        rx.prim_value(0),  # no MLA append
        backend("prefill_ragged"),
        backend("prefill_paged"),
        backend("decode"),
        backend("prefill_paged_sliding"),
        backend("decode_sliding"),
        rx.Tuple([]),  # no token trees
        rx.Tuple([]),
        rx.Tuple([]),  # no MLA prefill
        rx.Tuple([functions["merge_state"]]),
        functions["split_rotary"],
        functions["copy_single_page"],
        functions["debug_get_kv"],
        functions["compact_copy"],
    ]
