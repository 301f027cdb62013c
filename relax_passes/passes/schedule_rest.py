"""Schedule every TensorIR function that has no schedule of its own yet.

On CPUs, elementwise and reduction functions run their outermost spatial loops in parallel, when
there is enough work, and vectorize the innermost one. On GPUs TVM's dlight rules apply, and a
function that none of them takes is an error: it would run on one thread or not at all.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

from amx_tvm.errors import TargetError

PARALLEL_WORK = 1 << 15  # elements of a static function below which one thread is faster
LANES = 16


def schedule_rest(target: Any) -> tvm.transform.Pass:
    """Make the pass for a target."""
    return _gpu(target) if target.kind.name != "llvm" else _cpu()


def _gpu(target: Any) -> tvm.transform.Pass:
    from tvm.s_tir import dlight as dl

    rules = dl.ApplyDefaultSchedule(
        dl.gpu.Matmul(),
        dl.gpu.GEMV(),
        dl.gpu.Reduction(),
        dl.gpu.GeneralReduction(),
        dl.gpu.Fallback(),
    )

    @tvm.transform.module_pass(opt_level=0, name="ScheduleRest")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        with _plain(target):
            module = rules(module)
        for gvar, function in module.functions_items():
            if isinstance(function, tirx.PrimFunc) and not _is_scheduled(function):
                raise TargetError(
                    f"no schedule for {gvar.name_hint} on {target.kind.name}: it would not run in "
                    "parallel; report the model"
                )
        return module

    return run


def _plain(target: Any) -> Any:
    """Return the target as dlight knows it: of "sm_90a" it would think that it has no mma."""
    arch = str(target.attrs["arch"]).rstrip("af")
    return tvm.target.Target({**target.export(), "arch": arch})


def _cpu() -> tvm.transform.Pass:
    @tvm.transform.module_pass(opt_level=0, name="ScheduleRest")
    def run(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        updated = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        for gvar, function in module.functions_items():
            if isinstance(function, tirx.PrimFunc) and not _is_scheduled(function):
                updated[gvar] = _parallelize(function)
        return updated

    return run


def _is_scheduled(function: tirx.PrimFunc) -> bool:
    attrs = function.attrs
    return attrs is not None and bool(attrs.get("tirx.is_scheduled", False))


def _parallelize(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Run each leaf block's spatial loops in parallel; leave what does not fit as it is."""
    outer = getattr(function.body, "block", None)
    if outer is None or outer.name_hint != "root":
        # One opaque block: a sort of TVM's library, a cumulative sum. Nothing can be split.
        return function.with_attr("tirx.is_scheduled", True)
    schedule = s_tir.Schedule(function)
    root = schedule.get_sblock("root")
    for block in schedule.get_child_blocks(root):
        loops = schedule.get_loops(block)
        kinds = [v.iter_type for v in schedule.get(block).iter_vars]
        spatial = 0
        while spatial < min(len(loops), len(kinds)) and kinds[spatial] == tirx.IterVar.DataPar:
            spatial += 1
        if not spatial:
            continue
        extents = [schedule.get(loop).extent for loop in loops]
        fused = schedule.fuse(*loops[:spatial])
        work = 1
        for extent in extents:
            work *= int(extent) if isinstance(extent, tirx.IntImm) else 1 << 10
        if work >= PARALLEL_WORK:
            schedule.parallel(fused)
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)
