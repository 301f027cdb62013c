"""A module's kernels become machine code in parts, which threads work on at once.

TVM lowers and compiles one function after the other: three quarters of the time that a CPU's model
takes to compile. Functions do not call one another, so any part of them is a module of its own::

    functions, by size     part 0    part 1    part 2    part 3      a thread each, as cores allow
                             |         |         |         |
    objects                lib0.o    lib1.o    lib2.o    lib3.o      linked into one library

The parts do not depend on the machine that compiles: equal models give equal libraries. GPUs'
kernels stay together, whose compiler is a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax import vm_build

from amx_tvm.runtime.library import usable_cores
from relax_passes.tir_pipeline import PIPELINE

PARTS = 4

_T = TypeVar("_T")
_R = TypeVar("_R")


def compiled(module: tvm.IRModule, target: Any, pipeline: tvm.transform.Pass) -> Any:
    """Build a Relax VM executable, as ``tvm.compile(module, target, relax_pipeline=pipeline)``."""
    with target:
        module = pipeline(module)
    builder = relax.ExecBuilder()
    left = vm_build._filter_tir(vm_build._vmcodegen(builder, module))
    library = None
    if left is not None:
        library, *rest = in_threads(lambda part: _built(part, target), parts(left))
        for other in rest:
            library.import_module(other)
    attrs = dict(module.attrs or {})
    constants, foreign = attrs.get("const_name_to_constant", {}), attrs.get("external_mods", [])
    linked = vm_build._ffi_api.VMLink(builder, target, library, foreign, dict(constants))
    return vm_build.VMExecutable(linked)


def parts(module: tvm.IRModule) -> list[tvm.IRModule]:
    """Divide functions among modules of about the same size, in an order that names decide."""
    sizes = {gvar: _size(function) for gvar, function in module.functions_items()}
    kept: list[dict] = [{} for _ in range(min(PARTS, len(sizes)))]
    sums = [0] * len(kept)
    for gvar in sorted(sizes, key=lambda g: (-sizes[g], g.name_hint)):
        least = sums.index(min(sums))
        kept[least][gvar] = module[gvar]
        sums[least] += sizes[gvar]
    return [tvm.IRModule(functions, attrs=module.attrs) for functions in kept]


def in_threads(work: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """Do independent work on as many threads as there are cores, under this thread's options."""
    items, context = list(items), tvm.transform.PassContext.current()

    def one(item: _T) -> _R:
        with context:
            return work(item)

    with ThreadPoolExecutor(min(len(items), usable_cores())) as pool:
        begun = [pool.submit(one, item) for item in items]
        try:
            return [work.result() for work in begun]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _built(part: tvm.IRModule, target: Any) -> Any:
    return tvm.tirx.build(part, target=target, pipeline=PIPELINE)


def _size(function: Any) -> int:
    """Count a function's statements."""
    count = 0

    def visit(_node: Any) -> None:
        nonlocal count
        count += 1

    tvm_ffi.structural_walk(function, (tvm.tirx.Stmt, visit))
    return count


__all__ = ["PARTS", "compiled", "in_threads", "parts"]
