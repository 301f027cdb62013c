"""A measuring process in which some knobs fail: by the prefetch distance of the candidate."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from relax_passes.kernels.registry import register_rule
from tuning.worker import Bench, serve

HANG, CRASH, WRONG, BROKEN = 7001, 7002, 7003, 7004


class Faulty:
    """Stands in front of the real rules and answers only for the faulty knobs."""

    name = "faulty"

    def apply(self, spec, target, knobs=None):
        prefetch = (knobs or {}).get("prefetch")
        if prefetch == HANG:
            time.sleep(3600)
        if prefetch == CRASH:
            os.kill(os.getpid(), signal.SIGSEGV)
        if prefetch == BROKEN:
            raise ValueError("no such prefetch")
        return None

    def why(self, spec):
        return "never chosen"


def wrong(build):
    """Let one candidate compute the default's result plus one in the last row and column."""

    def inner(self, knobs):
        kernel = build(self, knobs)
        if knobs.get("prefetch") != WRONG:
            return kernel

        def off(*arguments):
            kernel(*arguments)
            y = arguments[-1].numpy().copy()
            y[-1, -1] += np.abs(y).max()
            arguments[-1].copyfrom(y)

        return off

    return inner


if __name__ == "__main__":
    register_rule(Faulty())
    Bench.build = wrong(Bench.build)
    serve()
