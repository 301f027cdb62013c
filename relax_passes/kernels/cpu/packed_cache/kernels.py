"""The second kernel of a layer: attention over what is stored, by the shape of the step."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from relax_passes.kernels.cpu.attention import vector as v
from relax_passes.kernels.cpu.attention.config import KVCacheConfig

from .decode import PackedDecode
from .layout import Layout, Step
from .prefill import PackedPrefill


def attend(layout: Layout, config: KVCacheConfig, target: Any, sinks: bool) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments: q [n, heads, d], k and v [n, kv_heads, d] of the `store` kernel, those of a step
    (`layout.Step`), sinks float32 [heads] where there are some, layer (int64); output
    [n, heads, d].

    Parameters
    ----------
    layout : Layout
        Of the cache.
    config : KVCacheConfig
        Of one layer.
    target : Target, dict or TargetInfo
        What is compiled for.
    sinks : bool
        Whether heads have sinks.
    """
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
    decode = PackedDecode(layout, config, target)
    prefill = PackedPrefill(layout, config, target)
    with IRBuilder() as builder:
        with T.prim_func():
            v.function("cpu_packed_attend")
            names = ("q", "k", "v", *Step.NAMES, *(["sinks"] if sinks else []))
            handles = {name: T.arg(name, T.handle()) for name in names}
            layer = T.arg("layer", T.int64())
            handles["output"] = T.arg("output", T.handle())
            n = T.int32()
            q = T.match_buffer(handles["q"], (n, heads, d), "float32")
            k = T.match_buffer(handles["k"], (n, kv_heads, d), "float32")
            value = T.match_buffer(handles["v"], (n, kv_heads, d), "float32")
            step = Step(layout, handles)
            given = T.match_buffer(handles["sinks"], (heads,), "float32") if sinks else None
            output = T.match_buffer(handles["output"], (n, heads, d), "float32")
            decode.prepare(step)
            prefill.prepare(step, sinks)
            with T.If(step.n == step.count):
                with T.Then():
                    decode.emit(step, layer, q, output, given)
                with T.Else():
                    prefill.emit(step, layer, (q, k, value), output, given)
        return builder.get()
