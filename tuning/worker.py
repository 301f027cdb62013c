"""The process that builds and times candidates: `python -m tuning.worker`.

It reads one JSON request a line and answers each with one JSON line. Whatever a kernel does to the
process (hang, crash, exhaust memory) ends the process and not the tuner, which starts another one.
Kernels and operands of the last specification stay in memory, so an incumbent is built once.

    {"spec": {...}, "target": "llvm", "rows": [1], "contenders": [{...}, ...], "repeats": 5}
    -> {"state": "ok", "errors": [[off, allowed], ...], "times": [[seconds, ...], ...], "host": ...}
    -> {"state": "build_failed" | "wrong" | ..., "detail": "...", "contender": 1}

A contender is a point of the kernel's space. Other processes answer the same requests: for devices
elsewhere (remote_worker.py) and, with built libraries as contenders, for GPUs (package_worker.py).

Timing: contenders take turns. In a turn each is called over all copies of the weights, which are
larger together than the last-level cache, so a call reads its weights from memory as it does inside
a model; the turn's number is the median of the calls.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from relax_passes.spec import LinearSpec
from tuning.oracle import Operands

WATCH_SECONDS = 1.0
CACHE_BYTES = 96 << 20  # the copies of the weights together; above the largest caches of one socket
MOST_COPIES = 48
MOST_CALLS_SECONDS = 0.15  # of one contender in one turn


class Refused(Exception):
    """A kernel that a device does not take, though the device itself is well."""


class Bench:
    """Operands of one specification where its kernels run.

    Parameters
    ----------
    operands : Operands
        Arguments and answers in NumPy.
    rows : sequence of int
        Numbers of rows of x.
    copies : int
        Copies of the weights.
    """

    def __init__(self, operands: Operands, rows: Sequence[int], copies: int = 1):
        self.operands = operands
        self.weights = [[self.send(w) for w in operands.weights] for _ in range(copies)]
        self.cases = []
        for m in rows:
            before, behind, answer = operands.arguments(m)
            there = [[self.send(a) for a in arguments] for arguments in (before, behind)]
            self.cases.append((*there, self.blank(answer), answer))

    def send(self, array: np.ndarray) -> Any:
        """Copy an array to the device."""
        import tvm

        return tvm.runtime.tensor(array)

    def receive(self, tensor: Any) -> np.ndarray:
        """Copy a result back."""
        return tensor.numpy()

    def blank(self, answer: np.ndarray) -> Any:
        """Return a result on the device that holds NaN."""
        return self.send(np.full(answer.shape, np.nan, self.operands.spec.out_dtype))

    def error(self, kernel: Any) -> tuple[float, float]:
        """Return (deviation from the oracle, what is allowed).

        Of the numbers of rows, that which is nearest to its limit or furthest beyond.
        """
        worst = (-1.0, 1.0)
        for before, behind, _, answer in self.cases:
            y = self.blank(answer)
            kernel(*before, *self.weights[0], *behind, y)
            found = self.operands.error(self.receive(y), answer)
            worst = max(worst, found, key=lambda pair: pair[0] / pair[1])
        return worst

    def seconds(self, kernel: Any) -> float:
        """Return the summed median seconds of a call over the measured numbers of rows."""
        total = 0.0
        for before, behind, y, _ in self.cases:
            taken = []
            start = last = time.perf_counter()
            for i in range(len(self.weights) + 1):
                kernel(*before, *self.weights[i % len(self.weights)], *behind, y)
                now = time.perf_counter()
                taken.append(now - last)
                last = now
                if now - start > MOST_CALLS_SECONDS and i >= 2:
                    break
            total += float(np.median(taken))
        return total

    def contend(self, kernels: Sequence[Any], repeats: int) -> dict[str, Any]:
        """Compare kernels with the oracle and time them in turns; returns the answer."""
        errors = []
        for number, kernel in enumerate(kernels):
            try:
                off, allowed = self.error(kernel)
            except Refused as error:
                return {"state": "build_failed", "contender": number, "detail": str(error)}
            if not off <= allowed:
                detail = f"differs from the oracle by {off:.2e}, the limit is {allowed:.0e}"
                return {"state": "wrong", "contender": number, "detail": detail}
            errors.append((off, allowed))
        times = turns(kernels, self.seconds, repeats) if repeats else []
        return {"state": "ok", "errors": errors, "times": times}


def copies_of(weights: Sequence[np.ndarray], cache: int = CACHE_BYTES) -> int:
    """Return how many copies of the weights exceed a cache together."""
    return max(2, -(-cache // sum(w.nbytes for w in weights)))


def turns(
    kernels: Sequence[Any], seconds: Callable[[Any], float], repeats: int
) -> list[list[float]]:
    """Time kernels in turns; the first turn warms up and does not count.

    Two take both orders in turn, more an order of the turn's own.
    """
    times: list[list[float]] = [[] for _ in kernels]
    order = list(range(len(kernels)))
    for turn in range(repeats + 1):
        order.reverse()
        if len(order) > 2:
            random.Random(turn).shuffle(order)
        for i in order:
            taken = seconds(kernels[i])
            if turn:
                times[i].append(taken)
    return times


def compiled(spec: LinearSpec, target: Any, knobs: dict[str, Any], rows: int | None = None) -> Any:
    """Compile a candidate to a module with the function "f"."""
    import tvm

    from relax_passes.tir_pipeline import PIPELINE
    from tuning.kernels import build

    func = build(spec, target, knobs, rows).func
    module = tvm.IRModule({"f": func.with_attr("global_symbol", "f")})
    return tvm.compile(module, target, tir_pipeline=PIPELINE)


class Server:
    """Answers requests; the operands and kernels of the last specification stay."""

    def __init__(self) -> None:
        self._key = ""
        self._built: dict[str, Any] = {}
        self.spec: LinearSpec
        self.target: Any = None
        self.bench: Bench

    def warm(self) -> dict[str, Any]:
        """Load what every request needs; returns what the tuner shall know of this process."""
        import relax_passes.kernels.registry  # noqa: F401 - warming up is the point

        return {}

    def prepare(self, request: dict[str, Any]) -> None:
        """Make ready for a specification."""
        from amx_tvm.targets import resolve

        self.target = resolve(request["target"]).tvm
        operands = Operands(self.spec)
        copies = min(MOST_COPIES, copies_of(operands.weights))
        self.bench = Bench(operands, request["rows"], copies)

    def build(self, contender: dict[str, Any]) -> Any:
        """Build a contender; whatever this raises is its failure."""
        return compiled(self.spec, self.target, contender)["f"]

    def contend(self, kernels: list[Any], repeats: int) -> dict[str, Any]:
        """Check built kernels and time them."""
        return self.bench.contend(kernels, repeats)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        if not request:
            return {"state": "ok", **self.warm()}
        key = json.dumps([request["spec"], request["target"], request["rows"]], sort_keys=True)
        if self._key != key:
            self._key, self._built = "", {}
            self.spec = LinearSpec.from_json(request["spec"])
            self.prepare(request)
            self._key = key
        kernels = []
        for number, contender in enumerate(request["contenders"]):
            text = json.dumps(contender, sort_keys=True)
            try:
                if text not in self._built:
                    self._built[text] = self.build(contender)
            except Exception as error:  # a candidate may fail in any way that Python knows
                detail = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
                return {"state": "build_failed", "contender": number, "detail": detail}
            kernels.append(self._built[text])
        return self.contend(kernels, int(request["repeats"]))


def serve(server: Server) -> None:
    """Answer requests until standard input ends; what libraries print goes to stderr."""
    _end_with_parent()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        out.write(json.dumps(server.answer(json.loads(line))) + "\n")
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
    serve(Server())
