"""A measuring process for packages without a GPU: a library's name says what its kernel does."""

from __future__ import annotations

import os

from tuning.worker import Server, serve

SECONDS = {"default.so": 2.0, "fast.so": 1.0, "slow.so": 3.0, "wrong.so": 0.1, "crash.so": 0.1}


class Stub(Server):
    """Answers from the names alone."""

    def prepare(self, request):
        """Nothing to make ready."""

    def build(self, contender):
        return contender["library"]

    def contend(self, kernels, repeats):
        if "crash.so" in kernels:
            os.abort()
        if "wrong.so" in kernels:
            return {"state": "wrong", "contender": 0, "detail": "differs"}
        times = [[SECONDS[k]] * repeats for k in kernels] if repeats else []
        return {"state": "ok", "errors": [(1e-4, 1e-3)] * len(kernels), "times": times}


if __name__ == "__main__":
    serve(Stub())
