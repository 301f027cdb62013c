from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import faulty_worker
import pytest

from amx_tvm.errors import TuningError
from relax_passes.activation import INT8
from relax_passes.spec import LinearSpec
from tuning import journal
from tuning.measure import ROOT, Failure, Measured, Worker
from tuning.records import file_name
from tuning.search import point_key
from tuning.session import Session
from tuning.spaces import Space
from tuning.tasks import Task, collect

HERE = Path(__file__).parent
FAULTY = (sys.executable, str(HERE / "faulty_worker.py"))
POINTS = (0, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
FAULTS = (
    faulty_worker.HANG,
    faulty_worker.CRASH,
    faulty_worker.WRONG,
    faulty_worker.BROKEN,
)


def space(values):
    return lambda _spec, _target, _rows: Space({"prefetch": values}, {"prefetch": 4096}, (1,))


def entries(path):
    return [entry for _, entry in journal.read(path)[0]]


def test_faulty_candidates_cost_one_candidate_each(tmp_path, spec, target):
    """A hang, a crash, a wrong result and a failing build are typed; the run goes on."""
    values = tuple(sorted((*FAULTS, 0, 4096)))
    with Worker("llvm", 10, FAULTY, threads=1) as worker:
        assert isinstance(worker.measure(spec, (1,), [{"prefetch": 4096}], 2), Measured)
        worker.limit = 8
        broken = worker.measure(spec, (1,), [{"prefetch": faulty_worker.BROKEN}], 0)
        assert isinstance(broken, Failure) and broken.kind == "build_failed"
        assert "no such prefetch" in broken.detail
        session = Session([Task(spec, "w", 1, 0)], target, tmp_path, [worker], space(values))
        (state,) = session.run(trials=len(values) - 1)
        # whichever came last, the worker serves again
        assert isinstance(worker.measure(spec, (1,), [{"prefetch": 4096}], 2), Measured)
        assert worker.starts == 3  # at first, after the hang, after the crash
    assert state.failures == {"hung": 1, "crashed": 1, "wrong": 1, "build_failed": 1}
    assert state.search.exhausted and state.search.incumbent["prefetch"] in (0, 4096)
    details = {e["state"]: e.get("detail", "") for e in entries(session.log)}
    assert "SIGSEGV" in details["crashed"] and "oracle" in details["wrong"]


class Killed:
    """A worker that is killed under its n-th request; what it measures is made up."""

    host = None

    def __init__(self, deadly):
        self.deadly, self.requests = deadly, 0

    def measure(self, spec, rows, contenders, repeats):
        self.requests += 1
        if self.requests == self.deadly:
            return Failure("crashed", "SIGKILL")
        times = [[1.0 if c["prefetch"] == 4096 else 0.5] * max(1, repeats) for c in contenders]
        return Measured(times, [(0.0, 1.0)] * len(contenders), {"cpu": "none"})

    def kill(self):
        pass

    close = kill


@pytest.mark.parametrize("deadly", [1, 2, 3, 4, 5])
def test_a_killed_worker_costs_one_trial_at_most(tmp_path, spec, target, deadly):
    """Under the default, a trial or the winner's last measurement."""
    worker = Killed(deadly)
    session = Session([Task(spec, "w", 1, 0)], target, tmp_path, [worker], space((0, 4096, 8192)))
    (state,) = session.run(trials=2)
    session.close()
    assert state.default_seconds == 1.0 and state.record is not None
    assert sum(state.failures.values()) == (deadly in (2, 3))


def test_a_worker_that_is_killed_at_any_moment_is_replaced(tmp_path, spec, target):
    """Signals from outside, while it starts, builds, measures or waits."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys, time\n"
        "for line in sys.stdin:\n"
        "    time.sleep(0.02)\n"
        "    many = len(json.loads(line).get('contenders', ()))\n"
        "    print(json.dumps({'state': 'ok', 'errors': [[0, 1]] * many,"
        " 'times': [[1.0] * 5] * many}), flush=True)\n"
    )
    stop, kills = threading.Event(), []

    def hunt(worker):
        while not stop.wait(random.uniform(0.01, 0.2)):
            process = worker._process
            if process is not None:
                process.kill()
                kills.append(process.pid)

    with Worker("llvm", 20, (sys.executable, "-S", str(script))) as worker:
        hunter = threading.Thread(target=hunt, args=(worker,))
        hunter.start()
        try:
            answers = [worker.measure(spec, (1,), [{"prefetch": 0}], 5) for _ in range(60)]
        except TuningError as error:  # killed three times in a row while it started
            answers = []
            assert "does not start" in str(error)
        finally:
            stop.set()
            hunter.join()
        failures = [a for a in answers if isinstance(a, Failure)]
        assert all(f.kind == "crashed" for f in failures) and len(failures) <= len(kills)
        last = worker._process
        if last is not None and last.pid in kills:  # a signal is still on its way to it
            last.wait()
        assert isinstance(worker.measure(spec, (1,), [{"prefetch": 0}], 5), Measured)


DAMAGE = {
    "phase": [None, "x", {}],
    "target": [None, {}],
    "kernel": [None, [], "x"],
    "knobs": [None, -1, [], {}, {"prefetch": "x"}, {"prefetch": 7}, {"prefetch": 4096, "a": 1}],
    "state": [None, {}, [1]],
    "against": [None, 1, {"prefetch": -1}],
    "ratio": [None, -1, [], [1], [0.9, 0.0, 1.0], [1, 2, "x"], [float("nan")] * 3, ["x"] * 3],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_line_of_the_log_is_named_and_skipped(tmp_path, spec, target, name):
    def session():
        return Session([Task(spec, "w", 1, 0)], target, tmp_path, [], space((0, 4096, 8192)))

    first = session()
    (state,) = first.states
    first.note(state, "default", state.space.default, seconds=1.0)
    for prefetch in (0, 8192):
        against = dict(state.space.default)
        first.note(state, "trial", {"prefetch": prefetch}, against=against, ratio=(0.8, 0.9, 0.95))
    first.note(state, "final", {"prefetch": 0}, "hung", detail="no answer")
    first.close()
    lines = first.log.read_text().splitlines()
    for value in [*DAMAGE[name], ...]:
        changed = json.loads(lines[1])
        if value is ...:
            del changed[name]
        else:
            changed[name] = value
        text = json.dumps(changed)
        first.log.write_text("\n".join([lines[0], text, *lines[2:]]) + "\n")
        again = session()
        again.close()
        (state,) = again.states
        assert [d.line for d in again.damage] == [2] and name in again.damage[0].reason
        assert state.default_seconds == 1.0 and state.search.trials == 1
        again.keep(state)
        assert state.record is None


def start_and_kill(tmp_path, log, moment):
    """Start a session in a process of its own and kill it after one more trial and a moment."""
    lines = log.read_bytes().count(b"\n") if log.exists() else 0
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, __file__, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    for _ in range(30_000):  # five minutes in which this test runs, however long they take
        if log.exists() and log.read_bytes().count(b"\n") > lines:
            break
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(moment)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_resumed_repeats_nothing(tmp_path, spec, target, kills):
    """SIGKILL while trials run: what was finished is there, and no point runs twice."""
    log = tmp_path / file_name(target.key).replace(".jsonl", ".trials.jsonl")
    kept = []
    for _ in range(kills):
        start_and_kill(tmp_path, log, random.uniform(0, 0.3))
        found = entries(log)
        assert found[: len(kept)] == kept and len(found) > len(kept)
        kept = found
        with open(log, "ab") as file:
            file.write(b'{"phase": "trial", "knobs": {"pre')  # as if the kill had hit a write
    with Worker("llvm", 60, threads=1) as worker:
        session = Session([Task(spec, "w", 1, 0)], target, tmp_path, [worker], space(POINTS))
        assert session.states[0].search.trials == sum(e["phase"] == "trial" for e in kept)
        assert len(session.damage) == kills and "torn" in session.damage[-1].reason
        with pytest.raises(TuningError, match="another session"):
            Session([Task(spec, "w", 1, 0)], target, tmp_path, [worker], space(POINTS))
        session.run(trials=100)
        session.close()
    after = entries(log)
    assert after[: len(kept)] == kept
    tried = [point_key(e["knobs"]) for e in after if e["phase"] == "trial"]
    assert len(tried) == len(set(tried)) == len(POINTS) - 1
    assert sum(e["phase"] == "default" for e in after) == 1
    # At least the default: what is kept was not slower than it.
    assert session.states[0].search.best_ratio <= 1.0
    assert not session.records.damage


def test_tasks_count_equal_kernels():
    kernels = [LinearSpec("amxfp4", 96, 64, INT8, m=m) for m in (1, None)]
    linears = [{"name": f"l{i}", "spec": kernels[0].to_json()} for i in range(3)]
    linears += [{"name": "l0", "spec": kernels[1].to_json()}]
    for other in ({"m_max": 16}, {"experts": 4}):  # in a chain; without records
        linears += [{"name": "l1", "spec": replace(kernels[1], **other).to_json()}]
    decode, prefill = collect({**linear, "kernel": "any"} for linear in linears)
    assert (decode.decode, decode.prefill, decode.name) == (3, 0, "l0")
    assert (prefill.decode, prefill.prefill) == (0, 1)
    assert [decode.spec, prefill.spec] == kernels
    assert Task.from_json(json.loads(json.dumps(decode.to_json()))) == decode


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "cuda:sm_90a"}, "on the GPU of this machine"),
        ({"target": "raspberry-pi/5-aarch64"}, "cannot run here"),
        ({"remote": "host:9190"}, "belong together"),
        ({"minutes": 0}, "above 0"),
        ({"trials": -1}, "above 0"),
    ],
)
def test_impossible_requests_say_why(tmp_path, options, message):
    import amx_tvm

    with pytest.raises(TuningError, match=message):
        amx_tvm.tune({"model_type": "llama"}, records=tmp_path, **options)


if __name__ == "__main__":  # the run that is killed
    from amx_tvm.targets import resolve
    from relax_passes.activation import INT8
    from relax_passes.spec import LinearSpec

    task = Task(LinearSpec("amxfp4", 96, 64, INT8, m=1), "w", 1, 0)
    with Worker("llvm", 60, threads=1) as measuring:
        Session([task], resolve("llvm"), sys.argv[1], [measuring], space(POINTS)).run(trials=100)
