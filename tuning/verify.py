"""Verification of a record file: every kernel is built again and compared with NumPy."""

from __future__ import annotations

from collections.abc import Iterator

from amx_tvm.errors import AmxError
from amx_tvm.targets import resolve
from tuning.kernels import KernelId, identity
from tuning.measure import Failure, Worker
from tuning.records import Record, RecordFile, refusal
from tuning.spaces import space_of


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


def verify(
    file: RecordFile, target: str = "llvm", limit: float = 60.0
) -> Iterator[tuple[Record, str | None]]:
    """Iterate over (record, why it is refused or None).

    Parameters
    ----------
    file : RecordFile
        The records.
    target : str
        The target that they are to be used on; it has to be this machine.
    limit : float
        Seconds that building and checking one kernel may take.
    """
    resolved = resolve(target)
    kernels = current_kernels(file, target)
    with Worker(target, limit) as worker:
        for record in file.records:
            kernel = kernels.get(record.kernel.problem)
            reason = refusal(record, resolved.key, kernel)
            if reason is None and kernel is None:
                reason = "no schedule builds its kernel any more"
            if reason is None:
                spec = record.kernel.spec
                rows = space_of(spec, resolved.tvm).rows
                result = worker.measure(spec, rows, [record.knobs], 0)
                if isinstance(result, Failure):
                    reason = f"{result.kind}: {result.detail}"
            yield record, reason
