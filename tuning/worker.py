"""The process that builds and times candidates: `python -m tuning.worker`.

It reads one JSON request a line and answers each with one JSON line. Whatever a kernel does to the
process (hang, crash, exhaust memory) ends the process and not the tuner, which starts another one.
Kernels and operands of the last specification stay in memory, so an incumbent is built once.

Timing: contenders take turns. In a turn each is called over all copies of the weights, which are
larger together than the last-level cache, so a call reads its weights from memory as it does inside
a model; the turn's number is the median of the calls.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import numpy as np

from relax_passes.spec import LinearSpec
from tuning.oracle import Operands, limit

WATCH_SECONDS = 1.0
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

    def compiled(self, knobs: dict[str, Any]) -> Any:
        """Compile a candidate; returns a module with the function "f"."""
        import tvm

        from tuning.kernels import build

        func = build(self.spec, self.target, knobs).func
        module = tvm.IRModule({"f": func.with_attr("global_symbol", "f")})
        return tvm.compile(module, self.target)

    def build(self, knobs: dict[str, Any]) -> Any:
        """Build a candidate, once."""
        key = json.dumps(knobs, sort_keys=True)
        if key not in self.kernels:
            self.kernels[key] = self.compiled(knobs)["f"]
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

    bench_type: type[Bench] = Bench

    def __init__(self) -> None:
        self._targets: dict[str, Any] = {}
        self._bench: tuple[str, Bench] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer "ping", "check" (build and compare) or "measure" (and time in turns)."""
        if request["op"] == "ping":
            import tvm  # noqa: F401 - warming up is the point

            import relax_passes.kernels.registry  # noqa: F401

            return {"state": "ok"}
        bench = self._bench_of(request)
        kernels: list[Any] = []
        if failure := self._built(bench, request["contenders"], kernels):
            return failure
        errors = [bench.error(kernel) for kernel in kernels]
        if failure := self._wrong(errors):
            return failure
        result: dict[str, Any] = {"state": "ok", "errors": errors}
        if request["op"] == "measure":
            calls = len(bench.weights) + 1
            result["times"] = self._turns(
                kernels, lambda kernel: bench.seconds(kernel, calls), int(request["repeats"])
            )
        return result

    @staticmethod
    def _built(bench: Any, contenders: list[dict], kernels: list[Any]) -> dict[str, Any] | None:
        """Build all contenders into ``kernels``; returns the answer if one refuses."""
        for number, knobs in enumerate(contenders):
            try:
                kernels.append(bench.build(knobs))
            except Exception as error:  # a candidate may fail in any way that Python knows
                detail = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
                return {"state": "build_failed", "contender": number, "detail": detail}
        return None

    @staticmethod
    def _wrong(errors: list[tuple[float, float]]) -> dict[str, Any] | None:
        """Return the answer if a contender differs from the oracle."""
        for number, (off, allowed) in enumerate(errors):
            if not off <= allowed:
                detail = f"differs from the oracle by {off:.2e}, the limit is {allowed:.0e}"
                return {"state": "wrong", "contender": number, "detail": detail}
        return None

    @staticmethod
    def _turns(kernels: list[Any], seconds: Any, repeats: int) -> list[list[float]]:
        """Time contenders in turns, in both orders; the first turn warms up and does not count."""
        times: list[list[float]] = [[] for _ in kernels]
        for turn in range(repeats + 1):
            order = range(len(kernels)) if turn % 2 else reversed(range(len(kernels)))
            for i in order:
                taken = seconds(kernels[i])
                if turn:
                    times[i].append(taken)
        return times

    def _bench_of(self, request: dict[str, Any]) -> Bench:
        key = json.dumps([request["spec"], request["target"], request["rows"]], sort_keys=True)
        if self._bench is None or self._bench[0] != key:
            from amx_tvm.targets import resolve

            self._bench = None
            name = request["target"]
            if name not in self._targets:
                self._targets[name] = resolve(name).tvm
            spec = LinearSpec(**request["spec"])
            self._bench = key, self.bench_type(spec, self._targets[name], tuple(request["rows"]))
        return self._bench[1]


def serve(server: Server | None = None) -> None:
    """Answer requests until standard input ends; what libraries print goes to stderr."""
    _end_with_parent()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server = server or Server()
    for line in sys.stdin:
        answer = server.answer(json.loads(line))
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _end_with_parent() -> None:
    """End this process when the tuner is gone, even inside a kernel that never returns.

    Linux could do it (PR_SET_PDEATHSIG), but counts the *thread* that started this process as its
    parent. Kernels run without the interpreter's lock, so a thread of our own is enough.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    serve()
