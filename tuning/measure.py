"""Measuring: candidates go to a warm worker process under a real time limit.

One protocol (worker.py) for this machine, for devices behind an RPC tracker (remote_worker.py) and
for packages on a machine with a GPU (package_worker.py).

Every way to fail has a name, costs one candidate and leaves the tuner running:

    build_failed   the schedule or the compiler refused the knobs
    wrong          the result differs from the NumPy oracle
    hung           no answer within the limit: the process is killed and replaced
    crashed        the process died (a segmentation fault, the out-of-memory killer)

and "lost" is no fault of the candidate: a remote device is gone, another one has to try.

Limits count time in which this process runs: while the machine is suspended, or a debugger or a
batch system has stopped both processes, the clock of a candidate stands still.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amx_tvm.errors import TuningError
from relax_passes.spec import LinearSpec

START_SECONDS = 120.0
START_TRIES = 3
TICK = 0.25  # seconds between looks at the clock
COMMAND = (sys.executable, "-m", "tuning.worker")
ROOT = str(Path(__file__).resolve().parents[1])  # workers import this very installation


@dataclass(frozen=True)
class Measured:
    """Contenders that took turns: ``times[contender][turn]`` in seconds.

    ``errors[contender]`` is (deviation from the oracle, what is allowed); ``host`` describes a
    device that is not this machine.
    """

    times: list[list[float]]
    errors: list[tuple[float, float]]
    host: dict[str, Any] | None = None


@dataclass(frozen=True)
class Failure:
    """A contender that cannot be kept: its number, the kind of failure and its details."""

    kind: str
    detail: str
    contender: int | None = None


def remote_workers(target: str, tracker: str, key: str, limit: float = 60.0) -> list[Worker]:
    """Return one worker for each device of a key that a tracker lists.

    Parameters
    ----------
    target : str
        What the devices are.
    tracker, key : str
        HOST:PORT of TVM's RPC tracker, and the key that the devices serve under.
    limit : float
        Seconds that a session on a device may take.

    Raises
    ------
    TuningError
        When the tracker does not answer or lists no such device.
    """
    from tvm import rpc

    from tuning.remote_worker import PATIENCE, count

    host, _, port = tracker.rpartition(":")
    if not host or not port.isdigit():
        raise TuningError(f"the tracker is {tracker!r}, expected HOST:PORT")
    try:
        with socket.create_connection((host, int(port)), timeout=10):
            pass
        devices = count(rpc.connect_tracker(host, int(port)), key)
    except (OSError, RuntimeError) as error:
        raise TuningError(
            f"no RPC tracker answers at {tracker} ({error}); start one there with "
            "`python -m tvm.exec.rpc_tracker --port PORT`"
        ) from error
    if not devices:
        raise TuningError(
            f"the tracker {tracker} lists no device of key {key!r}; start one with "
            f"`amx-tvm device-server --tracker {tracker} --key {key}`"
        )
    command = (sys.executable, "-m", "tuning.remote_worker", tracker, key, str(limit))
    # A session may be tried twice, after a build, and may wait for another tuner's session.
    whole = 4 * limit + PATIENCE
    return [Worker(target, whole, command) for _ in range(devices)]


def gpu_workers(target: str, lock: Path, limit: float, jobs: int | None) -> list[Worker]:
    """Return workers that build at the same time and measure in turns, on the GPU that is here.

    Parameters
    ----------
    target : str
        Name of the GPU's target.
    lock : Path
        A file that says whose turn it is.
    limit : float
        Seconds that building and measuring one candidate may take.
    jobs : int, optional
        How many; by default a core each, 8 at most.
    """
    count = jobs or min(8, os.cpu_count() or 1)
    command = (sys.executable, "-m", "tuning.gpu_worker", str(lock))
    return [Worker(target, limit * 2, command) for _ in range(count)]


class Worker:
    """A measuring process that is started when needed and replaced when it hangs or dies.

    Parameters
    ----------
    target : str
        Name of the target, as ``amx_tvm.targets.resolve`` takes it.
    limit : float
        Seconds that one request may take.
    command : sequence of str
        What to start.
    threads : int, optional
        Threads of a kernel; by default TVM's own choice.
    """

    def __init__(
        self,
        target: str,
        limit: float = 60.0,
        command: Sequence[str] = COMMAND,
        threads: int | None = None,
    ):
        self.target, self.limit, self.command = target, limit, tuple(command)
        self.threads, self.starts = threads, 0
        self.host: dict[str, Any] | None = None  # what the process says of its machine
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(
        self,
        spec: LinearSpec,
        rows: Sequence[int],
        contenders: Sequence[dict[str, Any]],
        repeats: int,
    ) -> Measured | Failure:
        """Build contenders, compare them with the oracle and time them in ``repeats`` turns.

        Without turns ``times`` is empty.
        """
        request = {
            "spec": spec.to_json(),
            "target": self.target,
            "rows": list(rows),
            "contenders": list(contenders),
            "repeats": repeats,
        }
        self._start()
        answer = self._ask(request, self.limit)
        if isinstance(answer, Failure):
            return answer
        if answer["state"] != "ok":
            return Failure(answer["state"], answer["detail"], answer.get("contender"))
        errors = [tuple(e) for e in answer["errors"]]
        return Measured(answer["times"], errors, answer.get("host", self.host))

    def _start(self) -> None:
        """Have a process that has imported the compiler; one that dies meanwhile is replaced."""
        if self._process is not None and self._process.poll() is None:
            return
        for _ in range(START_TRIES):
            self._launch()
            answer = self._ask({}, START_SECONDS)
            if not isinstance(answer, Failure):
                self.host = answer.get("host")
                return
        raise TuningError(f"the measuring process does not start: {answer.detail}")

    def _launch(self) -> None:
        self.close()
        environment = dict(os.environ)
        paths = [ROOT, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["PYTHONSAFEPATH"] = "1"  # nothing of the current directory
        if self.threads is not None:
            environment["TVM_NUM_THREADS"] = str(self.threads)
        # In memory: a scratch directory may be full or missing.
        self._errors = open(os.memfd_create("stderr"), "w+b")  # noqa: SIM115
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the tuner alone, which then ends its worker
        )
        self.starts += 1

    def _ask(self, request: dict[str, Any], limit: float) -> Any:
        """Send a request; return the answer, or a failure after ending the process."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._died()
        buffer, descriptor = b"", process.stdout.fileno()
        waited = 0.0
        while not buffer.endswith(b"\n"):
            start = time.monotonic()
            if not select.select([descriptor], [], [], TICK)[0]:
                waited += min(time.monotonic() - start, 2 * TICK)
                if waited >= limit:
                    self.close()
                    return Failure("hung", f"no answer within {limit:g} s")
                continue
            part = os.read(descriptor, 1 << 16)
            if not part:
                return self._died()
            buffer += part
        return json.loads(buffer)

    def _died(self) -> Failure:
        process = self._process
        assert process is not None
        code = process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self.close()
        return Failure("crashed", f"{name}: {lines[-1][:300]}" if lines else name)

    def kill(self) -> None:
        """End the process under whoever waits for its answer."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        pass
            self._errors.close()
            self._process = None
