"""A measuring process for remote devices: builds here, measures there through TVM's RPC.

    python -m tuning.remote_worker HOST:PORT KEY LIMIT

It answers the requests of worker.py. Candidates are compiled and linked on this machine; each
request then asks the tracker for a device of the key, and one session uploads, checks and times.
Nothing is left on the device, and several tuners can share it.

Timing is TVM's time evaluator on the device: one call a repeat, with the caches flushed before it,
so that weights come from memory as they do inside a model. Contenders take turns.

    hung     the session outlasted its limit; the server ended its process and lives on
    crashed  the session broke twice: a kernel that takes its process along
    lost     no device of the key is left at the tracker; the trial is not the candidate's fault
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from tuning.oracle import limit
from tuning.worker import CACHE_BYTES, Bench, Server, serve

PATIENCE = 20.0  # seconds without any device of the key until it counts as lost
CALLS = 5  # timed calls of a contender in one turn


class Lost(Exception):
    """No device is left."""


class RemoteBench(Bench):
    """Operands and answers of one specification on this machine, kernels as linked libraries."""

    def __init__(self, spec: Any, target: Any, rows: tuple[int, ...]):
        super().__init__(spec, target, rows)
        self.weights = []  # they go to the device with each session
        self.folder = tempfile.TemporaryDirectory(prefix="amx-tvm-tune-")

    def build(self, knobs: dict[str, Any]) -> Path:
        """Compile and link a candidate, once; returns its library."""
        from amx_tvm.linker import linker

        key = json.dumps(knobs, sort_keys=True)
        if key not in self.kernels:
            path = Path(self.folder.name) / f"kernel{len(self.kernels)}.so"
            link = linker(str(self.target.attrs.get("mtriple", "")))
            self.compiled(knobs).export_library(str(path), **({"fcompile": link} if link else {}))
            self.kernels[key] = path
        return self.kernels[key]


class OnDevice:
    """One session: the bench's operands and some kernels on the device."""

    def __init__(self, session: Any, bench: RemoteBench, libraries: list[Path]):
        import tvm

        self.bench, self.device = bench, session.cpu(0)
        self.modules = []
        for path in libraries:
            session.upload(str(path))
            self.modules.append(session.load_module(path.name))
        self._tensor = tvm.runtime.tensor
        self.weights = [self._tensor(w, self.device) for w in bench.operands.weights]
        self.cases = {}
        for m, (before, behind, y, answer) in bench.cases.items():
            there = [
                [tvm.runtime.tensor(a.numpy(), self.device) for a in x] for x in (before, behind)
            ]
            result = tvm.runtime.tensor(y.numpy(), self.device)
            self.cases[m] = (*there, result, answer)

    def _sent(self, array: Any) -> Any:
        return self._tensor(array.numpy(), self.device)

    def error(self, module: Any) -> tuple[float, float]:
        """Return (deviation from the oracle, what is allowed), the worst over numbers of rows."""
        worst = (-1.0, 1.0)
        for m, (before, behind, y, answer) in self.cases.items():
            y.copyfrom(np.full(answer.shape, np.nan, self.bench.spec.out_dtype))
            module["f"](*before, *self.weights, *behind, y)
            off = float(np.abs(y.numpy() - answer).max() / np.abs(answer).max())
            found = (off if np.isfinite(off) else float("inf"), limit(self.bench.spec, m))
            worst = max(worst, found, key=lambda pair: pair[0] / pair[1])
        return worst

    def seconds(self, module: Any) -> float:
        """Return the summed median seconds of a call over the measured numbers of rows."""
        timer = module.time_evaluator(
            "f", self.device, number=1, repeat=CALLS, cache_flush_bytes=CACHE_BYTES
        )
        return sum(
            float(np.median(timer(*before, *self.weights, *behind, y).results))
            for before, behind, y, _ in self.cases.values()
        )


class RemoteServer(Server):
    """Answers requests on devices of one key."""

    bench_type = RemoteBench

    def __init__(self, tracker: str, key: str, seconds: float):
        super().__init__()
        host, _, port = tracker.rpartition(":")
        self.tracker, self.key, self.limit = (host, int(port)), key, seconds

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Build here; check and time there, on a second device if the first breaks off."""
        if request["op"] == "ping":
            return super().answer(request)
        bench = cast(RemoteBench, self._bench_of(request))
        libraries: list[Any] = []
        if failure := self._built(bench, request["contenders"], libraries):
            return failure
        for last in (False, True):
            start = time.monotonic()
            try:
                return self._on_device(bench, libraries, request)
            except Lost as error:
                return {"state": "lost", "detail": str(error)}
            except Exception as error:  # TVM raises several types of its own
                lines = str(error).strip().splitlines() or [type(error).__name__]
                detail = lines[-1][:300]
                if "RPCSessionTimeoutError" in str(error) or (
                    time.monotonic() - start > 0.95 * self.limit
                ):
                    return {"state": "hung", "detail": f"no answer within {self.limit:g} s"}
                if last:
                    return {"state": "crashed", "detail": f"the session broke twice: {detail}"}
        raise AssertionError("unreachable")

    def _on_device(
        self, bench: RemoteBench, libraries: list[Path], request: dict[str, Any]
    ) -> dict[str, Any]:
        session = self._session()
        there = OnDevice(session, bench, libraries)
        errors = [there.error(module) for module in there.modules]
        if failure := self._wrong(errors):
            return failure
        result: dict[str, Any] = {"state": "ok", "errors": errors, "host": host_of(session)}
        if request["op"] == "measure":
            times = self._turns(there.modules, there.seconds, int(request["repeats"]))
            result["times"] = times
        return result

    def _session(self) -> Any:
        """Wait for a free device; give up when the tracker knows none for a while."""
        from tvm import rpc

        seen = time.monotonic()
        while True:
            try:
                tracker = rpc.connect_tracker(*self.tracker)
                if count(tracker, self.key):
                    return tracker.request(self.key, session_timeout=self.limit, max_retry=1)
            except (OSError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[-1]
            else:
                reason = f"the tracker lists no device of key {self.key!r}"
            if time.monotonic() - seen > PATIENCE:
                raise Lost(f"{self.tracker[0]}:{self.tracker[1]}: {reason}")
            time.sleep(1)


def count(tracker: Any, key: str) -> int:
    """Return how many devices of a key a tracker lists."""
    return sum(s["key"] == f"server:{key}" for s in tracker.summary()["server_info"])


def host_of(session: Any) -> dict[str, Any]:
    """Return what `amx-tvm device-server` says of its machine; {} for another kind of server."""
    try:
        return json.loads(session.get_function("amx.device.host")())
    except Exception:  # a server that was started by other means has no such function
        return {}


if __name__ == "__main__":
    serve(RemoteServer(sys.argv[1], sys.argv[2], float(sys.argv[3])))
