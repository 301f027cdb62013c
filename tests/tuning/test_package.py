"""Packages for a GPU that is elsewhere: what they hold, and what becomes of their results.

Nothing is compiled to machine code and no GPU is needed; the measuring itself has run on an H100
(docs/tuning.md).
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from amx_tvm.errors import TuningError
from amx_tvm.targets import ResolvedTarget
from amx_tvm.targets.cuda.target import target as cuda_target
from relax_passes.activation import FLOAT16
from relax_passes.kernels.cuda.linear.buffers import argument_shapes
from relax_passes.kernels.registry import linear_kernel
from relax_passes.spec import LinearSpec
from tuning import package, package_import, package_run
from tuning.lookup import Lookup
from tuning.measure import Worker
from tuning.oracle import FragmentOperands
from tuning.tasks import Task

SPEC = LinearSpec("amxfp4", 128, 1024, FLOAT16, residual=True, out_dtype="float16")


@pytest.fixture
def gpu(monkeypatch):
    target = ResolvedTarget(
        cuda_target("sm_90a"), "cuda/sm_90a", "cuda", "cuda-fragment", ("sm_90a",), ""
    )
    tasks = [Task(SPEC, "w", 1, 0, 1), Task(SPEC, "w", 0, 1, 64)]
    for module in (package, package_import):
        monkeypatch.setattr(module, "resolve", lambda _name: target)
    monkeypatch.setattr(package, "tasks_of", lambda *_: tasks)
    monkeypatch.setattr(package, "_build", lambda *_: {})
    return target


def measured(knobs, ratio, **more):
    times = {"seconds": 1e-6 * ratio, "spread": [1e-6, 1e-6], "ratio": [ratio - 0.01, ratio, ratio]}
    return {"knobs": knobs, "state": "ok", "error": 3e-4, "limit": 1.5e-3, **times, **more}


def write_results(folder, ratio):
    """Let the second candidate of the first task have a time, and the third fail."""
    tasks = json.loads((folder / "package.json").read_text())["tasks"]
    results = {}
    for number, task in enumerate(tasks):
        points = [c["knobs"] for c in task["candidates"]]
        found = [measured(points[0], 1.0), measured(points[1], ratio if number == 0 else 1.1)]
        found.append({"knobs": points[2], "state": "crashed", "detail": "illegal address"})
        final = {"candidate": 1, "default_seconds": 1e-6, **measured({}, ratio)}
        results[str(number)] = {"results": found, "final": None if number else final}
    (folder / "results.json").write_text(json.dumps({"gpu": "a GPU", "tasks": results}))
    return tasks


def test_results_become_records_that_compile_uses(tmp_path, gpu):
    folder = package.create({}, "cuda:sm_90a", tmp_path / "p", candidates=2, records=tmp_path)
    tasks = write_results(folder, 0.9)
    assert [t["rows"] for t in tasks] == [1, 64]
    assert all(len(t["candidates"]) == 3 for t in tasks)
    found = package_import.collect(folder, tmp_path)
    states, path = found.states, found.path
    assert not found.refused
    assert [s.record is not None for s in states] == [True, False]
    assert [s.failures for s in states] == [{"crashed": 1}, {"crashed": 1}]
    lookup = Lookup(path, gpu)
    knobs = lookup(SPEC)
    first = knobs["buckets"][0]
    best = tasks[0]["candidates"][1]["knobs"]
    assert first["rows"] == 1 and {k: first[k] for k in best} == best
    assert "M <= 1" in knobs.name and "0.900 of the default" in knobs.name
    assert linear_kernel(SPEC, gpu.tvm, knobs).func is not None
    assert lookup(replace(SPEC, n=256)) is None

    again = package_import.collect(folder, tmp_path)
    assert [s.search.trials for s in again.states] == [2, 2]
    trials = (tmp_path / "cuda_sm_90a.trials.jsonl").read_text().count('"phase":"trial"')
    assert trials == 4
    more = package.create({}, "cuda:sm_90a", tmp_path / "q", candidates=3, records=tmp_path)
    points = [t["candidates"] for t in json.loads((more / "package.json").read_text())["tasks"]]
    seen = [json.dumps(c["knobs"]) for c in tasks[0]["candidates"]]
    assert not set(seen[2:]) & {json.dumps(c["knobs"]) for c in points[0]}


def test_a_record_that_gains_too_little_is_none(tmp_path, gpu):
    folder = package.create({}, "cuda:sm_90a", tmp_path / "p", candidates=2, records=tmp_path)
    write_results(folder, 0.99)
    found = package_import.collect(folder, tmp_path)
    assert found.states[0].record is None and not found.path.exists()


def test_packages_without_results_and_of_other_revisions_are_refused(tmp_path, gpu):
    folder = package.create({}, "cuda:sm_90a", tmp_path / "p", candidates=2, records=tmp_path)
    with pytest.raises(TuningError, match="package_run"):
        package_import.collect(folder, tmp_path)
    with pytest.raises(TuningError, match="not empty"):
        package.create({}, "cuda:sm_90a", folder, records=tmp_path)
    write_results(folder, 0.9)
    content = json.loads((folder / "package.json").read_text())
    content["tasks"][0]["kernel"]["revision"] = "000000000000"
    (folder / "package.json").write_text(json.dumps(content))
    found = package_import.collect(folder, tmp_path)
    assert len(found.refused) == 1 and "revision 000000000000, now" in found.refused[0]
    assert [s.task.rows for s in found.states] == [64]
    content["tasks"][1]["kernel"]["revision"] = "000000000000"
    (folder / "package.json").write_text(json.dumps(content))
    with pytest.raises(TuningError, match="has changed since"):
        package_import.collect(folder, tmp_path)


@pytest.mark.parametrize("options", [{}, {"silu_mul": True}, {"bias": True, "residual": True}])
def test_operands_fit_the_kernel(options):
    spec = LinearSpec("amxfp4", 160, 192, FLOAT16, out_dtype="float16", **options)
    operands = FragmentOperands(spec)
    before, behind, answer = operands.arguments(3)
    given = [*before, *operands.weights, *behind, answer]
    for array, (_, shape, dtype) in zip(given, argument_shapes(spec), strict=True):
        assert array.shape == tuple(3 if extent is None else extent for extent in shape)
        assert array is answer or str(array.dtype) == dtype


def test_a_contest_names_who_failed_and_confirms_the_fastest():
    entry = {"spec": SPEC.to_json(), "rows": 8}
    names = ("default.so", "crash.so", "slow.so", "wrong.so", "fast.so")
    entry["candidates"] = [{"library": n, "knobs": {"name": n}, "failure": None} for n in names]
    entry["candidates"].append({"library": "", "knobs": {}, "failure": "no such tile"})
    command = (sys.executable, str(Path(__file__).parent / "package_stub.py"))
    with Worker("cuda/sm_90a", 60, command) as worker:
        found = package_run.Contest(worker, entry).run()
        assert worker.starts == 2
    states = [r["state"] for r in found["results"]]
    assert states == ["ok", "crashed", "ok", "wrong", "ok", "build_failed"]
    assert found["results"][2]["ratio"][1] == 1.5
    assert found["final"]["candidate"] == 4 and found["final"]["ratio"] == [0.5, 0.5, 0.5]
    assert found["final"]["default_seconds"] == 2.0 and found["results"][4]["error"] == 1e-4


def test_measuring_needs_no_compiler():
    """What `package_run` imports to measure, where TVM's Python package is missing."""
    code = """
import sys
sys.modules["tvm"] = None
import numpy as np
from relax_passes.activation import FLOAT16
from relax_passes.spec import LinearSpec
from tuning import package_run, package_worker
from tuning.oracle import FragmentOperands
operands = FragmentOperands(LinearSpec("amxfp4", 64, 128, FLOAT16, out_dtype="float16"))
assert operands.arguments(2)[2].shape == (2, 64)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
