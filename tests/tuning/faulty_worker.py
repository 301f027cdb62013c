"""A measuring process in which some knobs fail: by the prefetch distance of the candidate."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from tuning.worker import Server, serve

HANG, CRASH, WRONG, BROKEN = 7001, 7002, 7003, 7004


class FaultyServer(Server):
    """Stands in front of the real builds and answers for the faulty knobs."""

    def build(self, contender):
        prefetch = contender["prefetch"]
        if prefetch == HANG:
            time.sleep(3600)
        if prefetch == CRASH:
            os.kill(os.getpid(), signal.SIGSEGV)
        if prefetch == BROKEN:
            raise ValueError("no such prefetch")
        kernel = super().build(contender)
        return off(kernel) if prefetch == WRONG else kernel


def off(kernel):
    """Let a kernel's last row and column be wrong."""

    def run(*arguments):
        kernel(*arguments)
        y = arguments[-1].numpy().copy()
        y[-1, -1] += np.abs(y).max()
        arguments[-1].copyfrom(y)

    return run


if __name__ == "__main__":
    serve(FaultyServer())
