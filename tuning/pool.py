"""Workers that measure at the same time, each on a device of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from amx_tvm.errors import TuningError
from relax_passes.spec import LinearSpec
from tuning.measure import Failure, Measured, Worker


@dataclass(frozen=True)
class Job:
    """Contenders of one kernel to measure, and what to do with the result.

    Attributes
    ----------
    tries : int
        How often it is measured where the worker dies under it, as somebody may have killed it.
    """

    spec: LinearSpec
    rows: Sequence[int]
    contenders: list[dict[str, Any]]
    repeats: int
    handle: Callable[[Measured | Failure], None]
    tries: int = 1


class Pool:
    """Hands jobs to workers; results are handled in the calling thread.

    Attributes
    ----------
    workers : list of Worker
        Those that still have a device.
    lost : int
        How many devices disappeared.
    """

    def __init__(self, workers: Sequence[Worker]):
        self.workers, self.lost = list(workers), 0

    def drive(self, draw: Callable[[Worker], Job | None]) -> None:
        """Keep every worker busy with what ``draw`` hands out, until that is nothing.

        A device that disappears is dropped, and its job goes to another one.

        Raises
        ------
        TuningError
            When no device is left.
        """
        idle, again = list(self.workers), list[Job]()
        running: dict[Future[Measured | Failure], tuple[Worker, Job]] = {}
        with ThreadPoolExecutor(max(1, len(idle))) as threads:
            try:
                while True:
                    while idle:
                        job = again.pop() if again else draw(idle[-1])
                        if job is None:
                            break
                        worker = idle.pop()
                        running[threads.submit(_measure, worker, job)] = (worker, job)
                    if not running:
                        return
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        worker, job = running.pop(done)
                        result = done.result()
                        if isinstance(result, Failure) and result.kind == "lost":
                            again.append(job)
                            self._drop(worker, result)
                            continue
                        idle.append(worker)
                        died = isinstance(result, Failure) and result.kind == "crashed"
                        if died and job.tries > 1:
                            again.append(replace(job, tries=job.tries - 1))
                            continue
                        job.handle(result)
            except BaseException:  # Ctrl-C too: nobody waits for a kernel that may never return
                for worker in self.workers:
                    worker.kill()
                raise

    def _drop(self, worker: Worker, failure: Failure) -> None:
        worker.close()
        self.workers.remove(worker)
        self.lost += 1
        if not self.workers:
            raise TuningError(
                f"no device is left to measure on ({failure.detail}); what was measured is in the "
                "log, and the same command continues there"
            )


def _measure(worker: Worker, job: Job) -> Measured | Failure:
    return worker.measure(job.spec, job.rows, job.contenders, job.repeats)
