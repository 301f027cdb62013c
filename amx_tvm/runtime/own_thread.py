"""What engines have in common: a thread of their own, on which everything of theirs runs."""

from __future__ import annotations

from functools import partial

from amx_tvm.runtime.library import start_pool
from amx_tvm.runtime.vm import VirtualMachine
from amx_tvm.runtime.worker import Worker


class OwnThread:
    """An object whose work runs on a thread that it owns; calls of other threads take turns.

    Parameters
    ----------
    machine : VirtualMachine
        What the thread works with.
    threads : int or None
        Of TVM's pool; by default as many as there are cores.
    """

    def __init__(self, machine: VirtualMachine, threads: int | None):
        self._worker = Worker(partial(start_pool, threads), forks=machine.is_cpu)

    def __del__(self) -> None:
        # The thread last: with it, what everything else has freed goes back to the system.
        worker = self.__dict__.pop("_worker", None)
        self.__dict__.clear()
        del worker

    def close(self) -> None:
        """End the thread and what runs on it; the engine cannot be used any more."""
        self._worker.close()
