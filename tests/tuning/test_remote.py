"""TVM's tracker and servers on loopback: measuring, faulty kernels, a device that disappears."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import faulty_worker
import pytest

from amx_tvm.errors import TuningError
from relax_passes.activation import INT8
from relax_passes.spec import LinearSpec
from tuning.measure import ROOT, Failure, Measured, Worker, remote_workers
from tuning.session import Session
from tuning.spaces import Space
from tuning.tasks import Task

HERE = Path(__file__).parent
KEY = "board"
VALUES = (0, 512, 1024, 2048, 4096, 8192)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": ROOT}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], env=environment, start_new_session=True
    )


def end(process):
    """End a process with the sessions that it forked."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@pytest.fixture
def tracker():
    port = free_port()
    options = ("--host", "127.0.0.1", "--port", port, "--port-end", port + 1, "--silent")
    process = start("tvm.exec.rpc_tracker", *options)
    yield f"127.0.0.1:{port}"
    end(process)


@pytest.fixture
def devices(tracker):
    """Start servers; the test may end some of them."""
    started = []

    def more(count):
        for _ in range(count):
            options = ("--host", "127.0.0.1", "--port", free_port(), "--threads", 1)
            command = ("amx_tvm", "device-server", "--tracker", tracker, "--key", KEY)
            started.append(start(*command, *options))
        deadline = time.monotonic() + 120
        while True:
            try:
                if len(remote_workers("llvm", tracker, KEY)) >= len(started):
                    return started
            except TuningError:
                assert time.monotonic() < deadline
            time.sleep(0.5)

    yield more
    for process in started:
        end(process)


def space(values):
    return lambda _spec, _target, _rows: Space({"prefetch": values}, {"prefetch": 4096}, (1,))


@pytest.mark.slow
def test_two_servers_one_killed_midway(tmp_path, tracker, devices, target):
    """The session goes on with the server that is left, and every point of every task is there."""
    servers = devices(2)
    tasks = [Task(LinearSpec("amxfp4", n, 64, INT8, m=1), f"w{n}", 1, 0) for n in (96, 128)]
    workers = remote_workers("llvm", tracker, KEY, 20)
    assert len(workers) == 2
    killed = []

    def tell(progress):
        if progress.trials == 2 and not killed:
            killed.append(servers[0])
            end(servers[0])

    session = Session(tasks, target, tmp_path, workers, space(VALUES), tell)
    states = session.run(trials=100)
    assert killed and session.trials == 2 * (len(VALUES) - 1)
    for state in states:
        assert state.search.exhausted and not state.failures and state.default_seconds
    for worker in workers:
        worker.close()
    session.close()


@pytest.mark.slow
def test_faulty_kernels_cost_one_candidate_and_not_the_device(tracker, devices, spec):
    """A kernel that aborts, and one that never returns: the server takes the next session."""
    devices(1)
    command = (sys.executable, str(HERE / "faulty_remote.py"), tracker, KEY, "6")
    with Worker("llvm", 120, command) as worker:
        for knob, kind in ((faulty_worker.CRASH, "crashed"), (faulty_worker.HANG, "hung")):
            result = worker.measure(spec, (1,), [{"prefetch": knob}], 1)
            assert isinstance(result, Failure) and result.kind == kind, result
        result = worker.measure(spec, (1,), [{"prefetch": 0}, {"prefetch": 4096}], 2)
        assert isinstance(result, Measured) and worker.starts == 1
    assert result.host["cores"] and all(len(t) == 2 and min(t) > 0 for t in result.times)
    assert all(error <= allowed for error, allowed in result.errors)


def test_a_tracker_that_is_not_there_says_so():
    with pytest.raises(TuningError, match="no RPC tracker answers"):
        remote_workers("llvm", f"127.0.0.1:{free_port()}", KEY)
    with pytest.raises(TuningError, match="HOST:PORT"):
        remote_workers("llvm", "board", KEY)
