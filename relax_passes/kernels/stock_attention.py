"""``amx.attention`` by TVM's own paged cache: for GPUs, with heads that no kernel here takes."""

from __future__ import annotations

from typing import Any

from tvm import relax
from tvm.relax.frontend.nn.llm.kv_cache import RopeMode, TIRPagedKVCache

from amx_tvm.errors import ModelError
from relax_passes.attention_spec import AttentionSpec
from relax_passes.kernels.rotate import Turning
from relax_passes.ops import Attention
from relax_passes.rewriting import Context

PAGE_TOKENS = 16


class StockAttention:
    """Lowers the attention of one model.

    Parameters
    ----------
    specs : tuple of AttentionSpec
        All layers.
    target : tvm.target.Target
        What is compiled for.

    Raises
    ------
    ModelError
        For what TVM's kernels cannot do, by name.
    """

    def __init__(self, specs: tuple[AttentionSpec, ...], target: Any) -> None:
        self.specs, self.target = specs, target
        lacking = {
            "sliding layers": any(s.window for s in specs),
            "attention sinks": any(s.sinks for s in specs),
            f"scores bounded by {specs[0].soft_cap}": any(s.soft_cap for s in specs),
        }
        names = [name for name, found in lacking.items() if found]
        if names:
            raise ModelError(
                f"this model needs {' and '.join(names)}, which the attention kernels of the "
                f"target {target.kind.name!r} for {specs[0].heads} heads of {specs[0].head_dim} "
                "channels do not have; compile for a CPU"
            )

    def begin(self, ctx: Context, rows: Any, cache: relax.Expr) -> None:
        """Start a function: its layers share what rotates."""
        self.turning = Turning(ctx, rows, cache)

    def cache(self, ctx: Context, sizes: relax.ShapeExpr) -> relax.Expr:
        """Return the cache's object, in a tuple."""
        spec, (sequences, tokens, chunk) = self.specs[0], sizes.values
        with ctx.current():
            made = TIRPagedKVCache(
                attn_kind="mha",
                max_batch_size=sequences,
                max_total_seq_len=tokens,
                prefill_chunk_size=chunk,
                page_size=PAGE_TOKENS,
                support_sliding_window=0,
                layer_partition=relax.ShapeExpr([0, len(self.specs)]),
                num_hidden_layers=len(self.specs),
                num_attention_heads=spec.heads,
                num_key_value_heads=spec.kv_heads,
                qk_head_dim=spec.head_dim,
                v_head_dim=spec.head_dim,
                mla_original_qk_head_dim=0,
                mla_original_v_head_dim=0,
                rope_mode=RopeMode.NONE,
                rope_scale=1,
                rope_theta=10000.0,
                rope_scaling={},
                rope_ext_factors=relax.prim_value(0),
                rotary_dim=spec.head_dim,
                enable_disaggregation=False,
                dtype="float16",
                target=self.target,
            )
        return relax.Tuple([made._expr])

    def attend(self, _ctx: Context, asked: Attention) -> relax.Expr:
        """Return the attention of one layer."""
        spec, given = asked.spec, self.turning.turn(asked)
        return relax.call_dps_packed(
            "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
            [asked.cache, relax.prim_value(spec.layer), relax.prim_value(spec.scale), given],
            out_ty=relax.TensorType((asked.rows, spec.heads, spec.head_dim), given.ty.dtype),
        )
