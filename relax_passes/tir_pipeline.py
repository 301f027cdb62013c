"""TVM's passes from scheduled loops to what LLVM reads, without those that kernels here need not.

    tvm.compile(module, target, tir_pipeline=PIPELINE)

Kernels of this project are written as loops: their conditions stand where they belong and their
buffers have the sizes that they need. To look for conditions to hoist and for buffers to shrink
takes TVM 0.27 a third of the time of a build on CPUs and finds none. On CPUs it need not look for
what GPUs' threads share either: libraries are the same without, byte for byte. Functions that TVM
schedules, which begin with a root block, get all of its passes.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm.tirx.compilation_pipeline import register_tir_pipeline

PIPELINE = "amx_tvm"
SKIPPED = ["s_tir.HoistIfThenElse", "s_tir.CompactBufferAllocation"]
OF_GPUS = [
    "s_tir.InjectVirtualThread",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectSoftwarePipeline",
    "s_tir.InferFragment",
    "s_tir.ThreadSync",
]


def _pipeline() -> tuple:
    """Return what TVM's pipelines are: the passes, and those that end a host's and a device's."""
    stock, *ends = default_s_tir_pipeline()

    @tvm.transform.module_pass(opt_level=0, name="LowerLoops")
    def run(module: tvm.IRModule, context: tvm.transform.PassContext) -> tvm.IRModule:
        kinds: dict[str, dict[tvm.ir.GlobalVar, Any]] = {"scheduled": {}, "cpu": {}, "gpu": {}}
        for gvar, function in module.functions_items():
            on_cpu = function.attrs["target"].kind.name == "llvm"
            kind = "cpu" if on_cpu else "gpu"
            if isinstance(function.body, s_tir.stmt.SBlockRealize):
                kind = "scheduled"
            kinds[kind][gvar] = function
        lowered = stock(tvm.IRModule(kinds.pop("scheduled"), attrs=module.attrs))
        for kind, functions in kinds.items():
            skipped = SKIPPED + OF_GPUS if kind == "cpu" else SKIPPED
            with tvm.transform.PassContext(
                opt_level=context.opt_level, disabled_pass=skipped, config=context.config
            ):
                lowered.update(stock(tvm.IRModule(functions, attrs=module.attrs)))
        return lowered

    return run, *ends


register_tir_pipeline(PIPELINE, _pipeline)
