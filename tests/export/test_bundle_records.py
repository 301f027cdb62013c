"""The tuning records that a bundle was compiled with are in it, and make it again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import amx_tvm
from amx_tvm.targets import resolve
from relax_passes.spec import LinearSpec
from tuning.decisions import trace_of
from tuning.kernels import identity
from tuning.lookup import Lookup
from tuning.records import Record, file_name
from tuning.spaces import space_of

TARGET = "x86-64-v3"


def test_used_records_come_along(tiny_artifact, tmp_path):
    target = resolve(TARGET)
    linears = tiny_artifact.manifest.linears
    spec = next(s for s in (LinearSpec.from_json(e["spec"]) for e in linears) if s.m == 1)
    kernel = identity(spec, target.tvm, target.layout)

    space = space_of(spec, target.tvm)
    knobs = dict(space.default)
    used = Record(
        target.key, kernel, knobs, trace_of(space, knobs), (1,), 1e-5, 2e-5, (1e-5, 1e-5),
        (0.5, 0.5, 0.5), {"error": 0.0, "limit": 1e-5}, time="2026-01-31T12:00:00Z",
    )  # fmt: skip
    worse = replace(used, ratio=(0.9, 0.9, 0.9))
    folder = tmp_path / "records"
    folder.mkdir()
    lines = [json.dumps(r.to_json()) for r in (worse, used)]
    (folder / file_name(target.key)).write_text("".join(line + "\n" for line in lines))
    assert Lookup(folder / file_name(target.key), target)(spec) is not None
    made = amx_tvm.export(tiny_artifact, TARGET, tmp_path / "b", records=folder, runtimes=())
    name = f"tuning/{file_name(target.key)}"
    assert name in made.manifest.files
    kept = [json.loads(x) for x in (Path(made.path) / name).read_text().splitlines()]
    assert kept == [json.loads(lines[1])]
    again = amx_tvm.export(
        tiny_artifact, TARGET, tmp_path / "c", records=tmp_path / "b" / "tuning", runtimes=()
    )
    assert again.manifest.files[name] == made.manifest.files[name]
    assert again.manifest.library == made.manifest.library
