"""Verification of a record file: every kernel is built again, and compared with NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from amx_tvm.errors import AmxError, TuningError
from amx_tvm.scratch import scratch
from amx_tvm.targets import resolve
from tuning.api import gpu_is_here
from tuning.kernels import KernelId, identity
from tuning.measure import Failure, Worker, gpu_workers
from tuning.records import Record, RecordFile, refusal
from tuning.spaces import space_of
from tuning.worker import compiled


def current_kernels(file: RecordFile, target: str) -> dict[tuple, KernelId]:
    """Return the kernels that this installation builds for a file's records, by problem.

    Records of other targets, and kernels that no schedule builds any more, have no entry.
    """
    resolved = resolve(target)
    found = {}
    for record in file.records:
        if record.target != resolved.key:
            continue
        try:
            made = record.kernel
            kernel = identity(made.spec, resolved.tvm, resolved.layout, made.rows)
        except (AmxError, ValueError):
            continue
        found[record.kernel.problem] = kernel
    return found


def target_of(file: RecordFile) -> str:
    """Return the name of the target that a file's records are for.

    Raises
    ------
    TuningError
        For records of several targets, for none, and for a CPU that is not this one.
    """
    keys = sorted({record.target for record in file.records})
    if len(keys) != 1:
        raise TuningError(
            f"{file.path} has records of {', '.join(keys) or 'no target'}; expected one"
        )
    kind, _, name = keys[0].partition("/")
    if kind == "cuda":
        return f"cuda:{name}"
    here = resolve("llvm")
    if here.key != keys[0]:
        raise TuningError(f"{file.path} is for {keys[0]}, and this machine is {here.key}")
    return "llvm"


def verify(
    file: RecordFile, target: str, limit: float = 60.0
) -> Iterator[tuple[Record, str | None]]:
    """Iterate over (record, why it is refused or None).

    Every record's kernel is built and its trace replayed; where `compares` says so, its results are
    compared with NumPy's too.

    Parameters
    ----------
    file : RecordFile
        The records.
    target : str
        The target that they are to be used on.
    limit : float
        Seconds that building and checking one kernel may take.
    """
    resolved = resolve(target)
    kernels = current_kernels(file, target)
    with ExitStack() as stack:
        check: Callable[[Record], str | None]
        if not compares(target):
            check = partial(_builds, target=resolved.tvm)
        elif resolved.device == "cuda":
            lock = stack.enter_context(scratch("amx-tvm-verify-")) / "gpu.lock"
            (worker,) = gpu_workers(target, lock, limit, 1)
            check = partial(_is_right, worker=stack.enter_context(worker), target=resolved.tvm)
        else:
            worker = stack.enter_context(Worker(target, limit))
            check = partial(_is_right, worker=worker, target=resolved.tvm)
        for record in file.records:
            kernel = kernels.get(record.kernel.problem)
            reason = refusal(record, resolved.key, kernel)
            if reason is None and kernel is None:
                reason = "no schedule builds its kernel any more"
            yield record, reason or check(record)


def compares(target: str) -> bool:
    """Whether results can be compared here: not for a GPU that is elsewhere."""
    resolved = resolve(target)
    return resolved.device == "cpu" or gpu_is_here(resolved)


def _is_right(record: Record, worker: Worker, target: Any) -> str | None:
    """Build a record's kernel and compare it with NumPy."""
    spec = record.kernel.spec
    rows = space_of(spec, target, record.kernel.rows).rows
    result = worker.measure(spec, rows, [record.knobs], 0)
    return f"{result.kind}: {result.detail}" if isinstance(result, Failure) else None


def _builds(record: Record, target: Any) -> str | None:
    """Build a record's kernel."""
    try:
        compiled(record.kernel.spec, target, record.knobs, record.kernel.rows)
    except Exception as error:  # whatever the compiler says of it
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"build_failed: {lines[-1][:300]}"
    return None
