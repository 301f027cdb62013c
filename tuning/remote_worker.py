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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.linker import linker
from tuning.oracle import Operands
from tuning.worker import CACHE_BYTES, Bench, Server, compiled, serve

PATIENCE = 20.0  # seconds without any device of the key until it counts as lost
CALLS = 5  # timed calls of a contender in one turn


class Lost(Exception):
    """No device is left."""


class RemoteBench(Bench):
    """Operands on a device, for the time of one session."""

    def __init__(self, session: Any, operands: Operands, rows: Sequence[int]):
        self.device = session.cpu(0)
        super().__init__(operands, rows)

    def send(self, array: np.ndarray) -> Any:
        """Copy an array to the device."""
        import tvm

        return tvm.runtime.tensor(array, self.device)

    def error(self, kernel: Any) -> tuple[float, float]:
        """Compare a module's function; see ``Bench``."""
        return super().error(kernel["f"])

    def seconds(self, kernel: Any) -> float:
        """Return the summed median seconds of a call over the measured numbers of rows."""
        timer = kernel.time_evaluator(
            "f", self.device, number=1, repeat=CALLS, cache_flush_bytes=CACHE_BYTES
        )
        return sum(
            float(np.median(timer(*before, *self.weights[0], *behind, y).results))
            for before, behind, y, _ in self.cases
        )


class RemoteServer(Server):
    """Answers requests on devices of one key."""

    def __init__(self, tracker: str, key: str, seconds: float):
        super().__init__()
        host, _, port = tracker.rpartition(":")
        self.tracker, self.key, self.limit = (host, int(port)), key, seconds

    def prepare(self, request: dict[str, Any]) -> None:
        """Make ready for a specification; nothing goes to a device yet."""
        from amx_tvm.targets import resolve

        self.target = resolve(request["target"]).tvm
        self.operands, self.rows = Operands(self.spec), request["rows"]
        self.folder = tempfile.TemporaryDirectory(prefix="amx-tvm-tune-")

    def build(self, contender: dict[str, Any]) -> Path:
        """Compile and link a candidate; returns its library."""
        path = Path(self.folder.name) / f"kernel{len(self._built)}.so"
        link = linker(str(self.target.attrs.get("mtriple", "")))
        module = self.compiled(contender)
        module.export_library(str(path), fcompile=link)
        return path

    def compiled(self, contender: dict[str, Any]) -> Any:
        """Compile a candidate."""
        return compiled(self.spec, self.target, contender)

    def contend(self, kernels: list[Path], repeats: int) -> dict[str, Any]:
        """Check and time on a device, on a second one if the first breaks off."""
        for last in (False, True):
            start = time.monotonic()
            try:
                return self._on_device(kernels, repeats)
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

    def _on_device(self, libraries: list[Path], repeats: int) -> dict[str, Any]:
        session = self._session()
        modules = []
        for path in libraries:
            session.upload(str(path))
            modules.append(session.load_module(path.name))
        answer = RemoteBench(session, self.operands, self.rows).contend(modules, repeats)
        return {**answer, "host": host_of(session)}

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
