"""The process that builds and times candidates: `python -m tuning.worker`.

It reads one JSON request a line and answers each with one JSON line. Whatever a kernel does to the
process (hang, crash, exhaust memory) ends the process and not the tuner, which starts another one.
Kernels and operands of the last specification stay in memory, so an incumbent is built once.

Timing: contenders take turns. In a turn each is called over all copies of the weights, which are
larger together than the last-level cache, so a call reads its weights from memory as it does inside
a model; the turn's number is the median of the calls.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any

import numpy as np

from relax_passes.schedules.spec import LinearSpec
from tuning.oracle import Operands, limit

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CACHE_BYTES = 96 << 20  # the copies of the weights together; above the largest caches of one socket
MOST_COPIES = 48
MOST_CALLS_SECONDS = 0.15  # of one contender in one turn


class Bench:
    """Operands, answers and built kernels of one specification."""

    def __init__(self, spec: LinearSpec, target: Any, rows: tuple[int, ...]):
        import tvm

        self.spec, self.target, self.rows = spec, target, rows
        self.operands = Operands(spec)
        self.cases = {}
        for m in rows:
            before, behind, answer = self.operands.arguments(m)
            self.cases[m] = (
                [tvm.runtime.tensor(a) for a in before],
                [tvm.runtime.tensor(a) for a in behind],
                tvm.runtime.empty(answer.shape, spec.out_dtype),
                answer,
            )
        size = sum(w.nbytes for w in self.operands.weights)
        copies = min(MOST_COPIES, max(2, -(-CACHE_BYTES // size)))
        self.weights = [
            [tvm.runtime.tensor(w) for w in self.operands.weights] for _ in range(copies)
        ]
        self.kernels: dict[str, Any] = {}

    def build(self, knobs: dict[str, Any]) -> Any:
        """Build a candidate, once."""
        import tvm

        from relax_passes.schedules.registry import linear_kernel

        key = json.dumps(knobs, sort_keys=True)
        if key not in self.kernels:
            func = linear_kernel(self.spec, self.target, knobs).func
            module = tvm.IRModule({"f": func.with_attr("global_symbol", "f")})
            self.kernels[key] = tvm.compile(module, self.target)["f"]
        return self.kernels[key]

    def error(self, kernel: Any) -> tuple[float, float]:
        """Return (deviation from the oracle relative to its largest value, what is allowed).

        Of the numbers of rows, that which is nearest to its limit or furthest beyond.
        """
        worst = (-1.0, 1.0)
        for m, (before, behind, y, answer) in self.cases.items():
            y.copyfrom(np.full(answer.shape, np.nan, self.spec.out_dtype))
            kernel(*before, *self.weights[0], *behind, y)
            off = float(np.abs(y.numpy() - answer).max() / np.abs(answer).max())
            found = (off if np.isfinite(off) else float("inf"), limit(self.spec, m))
            worst = max(worst, found, key=lambda pair: pair[0] / pair[1])
        return worst

    def seconds(self, kernel: Any, calls: int) -> float:
        """Return the summed median seconds of a call over the measured numbers of rows."""
        total = 0.0
        for before, behind, y, _ in self.cases.values():
            taken = []
            start = last = time.perf_counter()
            for i in range(calls):
                kernel(*before, *self.weights[i % len(self.weights)], *behind, y)
                now = time.perf_counter()
                taken.append(now - last)
                last = now
                if now - start > MOST_CALLS_SECONDS and i >= 2:
                    break
            total += float(np.median(taken))
        return total


class Server:
    """State between requests: the target and the bench of the last specification."""

    def __init__(self) -> None:
        self._targets: dict[str, Any] = {}
        self._bench: tuple[str, Bench] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer "ping", "check" (build and compare) or "measure" (and time in turns)."""
        if request["op"] == "ping":
            import tvm  # noqa: F401 - warming up is the point

            import relax_passes.schedules.registry  # noqa: F401

            return {"state": "ok"}
        bench = self._bench_of(request)
        kernels = []
        for number, knobs in enumerate(request["contenders"]):
            try:
                kernel = bench.build(knobs)
            except Exception as error:  # a candidate may fail in any way that Python knows
                detail = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
                return {"state": "build_failed", "contender": number, "detail": detail}
            kernels.append(kernel)
        errors = [bench.error(kernel) for kernel in kernels]
        for number, (off, allowed) in enumerate(errors):
            if not off <= allowed:
                detail = f"differs from the oracle by {off:.2e}, the limit is {allowed:.0e}"
                return {"state": "wrong", "contender": number, "detail": detail}
        result: dict[str, Any] = {"state": "ok", "errors": errors}
        if request["op"] == "measure":
            times: list[list[float]] = [[] for _ in kernels]
            calls = len(bench.weights) + 1
            for turn in range(int(request["repeats"]) + 1):
                order = range(len(kernels)) if turn % 2 else reversed(range(len(kernels)))
                for i in order:
                    seconds = bench.seconds(kernels[i], calls)
                    if turn:  # the first turn warms up
                        times[i].append(seconds)
            result["times"] = times
        return result

    def _bench_of(self, request: dict[str, Any]) -> Bench:
        key = json.dumps([request["spec"], request["target"], request["rows"]], sort_keys=True)
        if self._bench is None or self._bench[0] != key:
            from amx_tvm.targets import resolve

            self._bench = None
            name = request["target"]
            if name not in self._targets:
                self._targets[name] = resolve(name).tvm
            spec = LinearSpec(**request["spec"])
            self._bench = key, Bench(spec, self._targets[name], tuple(request["rows"]))
        return self._bench[1]


def serve() -> None:
    """Answer requests until standard input ends; what libraries print goes to stderr."""
    _die_with_parent()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server = Server()
    for line in sys.stdin:
        answer = server.answer(json.loads(line))
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _die_with_parent() -> None:
    """Have Linux end this process with the tuner, even inside a kernel that never returns."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    serve()
