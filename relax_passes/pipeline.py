"""The one ordered pipeline, in named phases.

    find       functions of float32 become float16 on GPUs; ordinary products with a weight become
               amx.linear; biases fold in
    merge      linears of one input become one; residuals, silu(gate) * up and norms of heads
               fold in; LoRA adapters that stay apart get a step of their own
    quantize   weights become packed parameters, activations are quantized in front
    legalize   buckets of rows; operators, attention first, become scheduled TensorIR kernels
    lower      Relax's own operators: legalization, fusion, schedules for what is left
    plan       weights as one tuple, memory planning, tensors that layers share, lowering to the
               virtual machine

Merging comes after annotation, not before: one rule then covers every orientation of the weight
and linears with and without bias. ``dump`` sees the module after each phase.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm_ffi import register_error

from amx_tvm.errors import AmxError
from relax_passes.adapters import AdapterPlan
from relax_passes.attention_spec import PLAIN, CacheStorage
from relax_passes.machine_code import compiled
from relax_passes.passes.adapt import adapt
from relax_passes.passes.annotate_linears import annotate_linears
from relax_passes.passes.buckets import make_buckets
from relax_passes.passes.bundle_parameters import bundle_parameters
from relax_passes.passes.device_steps import device_steps
from relax_passes.passes.fuse_conversions import fuse_conversions
from relax_passes.passes.fuse_epilogue import fuse_bias, fuse_residual_and_gate
from relax_passes.passes.fuse_head_norms import fuse_head_norms
from relax_passes.passes.half_precision import half_precision
from relax_passes.passes.keep_parameters import keep_parameters
from relax_passes.passes.legalize import legalize
from relax_passes.passes.lower_attention import lower_attention
from relax_passes.passes.lower_dense import lower_dense
from relax_passes.passes.lower_experts import lower_experts
from relax_passes.passes.lower_packed import lower_packed
from relax_passes.passes.merge_projections import merge_projections
from relax_passes.passes.order_shape_functions import order_shape_functions
from relax_passes.passes.patches import patches
from relax_passes.passes.quantize_activations import quantize_activations
from relax_passes.passes.quantize_parameters import quantize_parameters
from relax_passes.passes.schedule_rest import schedule_rest
from relax_passes.passes.share_tensors import share_tensors
from relax_passes.policy import Policy
from relax_passes.take import take
from relax_passes.tir_pipeline import PIPELINE

# What a pass raises comes out of TVM as a RuntimeError, unless TVM knows the class.
for _error in AmxError.__subclasses__():
    register_error(_error.__name__, _error)

Dump = Callable[[str, tvm.IRModule], None]


def phases(
    target: Any,
    policy: Policy,
    layout: str,
    records: Any = None,
    storage: CacheStorage = PLAIN,
    adapters: AdapterPlan | None = None,
) -> list[tuple[str, list[tvm.transform.Pass]]]:
    """Return the phases up to memory planning, in order, each with its passes.

    Parameters
    ----------
    target : tvm.target.Target
        What is compiled for.
    policy : Policy
        Which linear gets which format.
    layout : str
        Packed weight layout of the target's kernels.
    records : callable, optional
        LinearSpec -> knobs from tuning records.
    storage : CacheStorage
        How keys and values are kept, where the model has attention.
    adapters : AdapterPlan, optional
        Which weights have LoRA adapters that rows choose among.
    """
    from tvm.relax import pipeline as stock

    return [
        (
            "find",
            [half_precision(target), patches(target), annotate_linears(policy), fuse_bias()],
        ),
        (
            "merge",
            [
                merge_projections,
                fuse_residual_and_gate(target),
                fuse_head_norms(target, storage),
                adapt(adapters),
            ],
        ),
        ("quantize", [quantize_parameters(policy, layout), quantize_activations(target)]),
        (
            "legalize",
            [
                make_buckets(target),
                lower_attention(target, storage),
                lower_packed(target),
                lower_dense(target),
                fuse_conversions,
                device_steps(target),
                lower_experts(target),
                legalize(target, records),
            ],
        ),
        (
            "lower",
            [
                *stock.library_dispatch_passes(target),
                # A reshape stays an operator: the virtual machine makes it a view.
                relax.transform.LegalizeOps({"relax.take": take}, skip_ops=["relax.reshape"]),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FoldConstant(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                schedule_rest(target),
            ],
        ),
        ("bundle", [bundle_parameters]),
    ]


def run(
    module: tvm.IRModule,
    target: Any,
    policy: Policy,
    layout: str,
    records: Any = None,
    dump: Dump | None = None,
    storage: CacheStorage = PLAIN,
    adapters: AdapterPlan | None = None,
) -> tvm.IRModule:
    """Run all phases; the result is ready for :func:`build`."""
    if dump is not None:
        dump("input", module)
    with target:
        for name, passes in phases(target, policy, layout, records, storage, adapters):
            for one in passes:
                module = one(module)
            if dump is not None:
                dump(name, module)
    return module


def build(module: tvm.IRModule, target: Any) -> Any:
    """Plan memory and compile to a Relax VM executable."""
    final = tvm.transform.Sequential(final_passes(target))
    if target.kind.name != "cuda":
        return compiled(module, target, final)
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        return tvm.compile(module, target=target, relax_pipeline=final, tir_pipeline=PIPELINE)


def final_passes(target: Any) -> list[tvm.transform.Pass]:
    """Return the passes that plan memory and CUDA graphs and lower to the virtual machine."""
    backend = "cuda" if target.kind.name == "cuda" else "cpu_generic"
    stock = import_module(f"tvm.relax.backend.{backend}.pipeline")
    # TVM's RewriteDataflowReshape is left out: reshapes were never legalized, and it aborts on
    # scheduled functions that have no root block.
    return [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        *_finalize(stock.finalize_passes(target)),
    ]


def _finalize(passes: list[tvm.transform.Pass]) -> list[tvm.transform.Pass]:
    """Return the stock passes with ours where what they change has just been made."""
    made: list[tvm.transform.Pass] = []
    for one in passes:
        if one.info.name == "KillAfterLastUse":
            made += [share_tensors, one, keep_parameters]
        else:
            made += [one, order_shape_functions] if one.info.name == "VMShapeLower" else [one]
    return made


def dump_to(directory: str | os.PathLike[str]) -> Dump:
    """Return a dump function that writes NN-phase.py files into a directory."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    count = 0

    def write(phase: str, module: tvm.IRModule) -> None:
        nonlocal count
        path = folder / f"{count:02d}-{phase}.py"
        path.write_text(module.script(show_meta=False), encoding="utf-8")
        count += 1

    return write


__all__ = ["build", "dump_to", "final_passes", "phases", "run"]
