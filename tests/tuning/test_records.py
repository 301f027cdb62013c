from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tuning_points import edit

from amx_tvm.errors import TuningError
from relax_passes.activation import INT8
from relax_passes.spec import LinearSpec
from tuning import journal
from tuning.kernels import KernelId, identity
from tuning.lookup import Lookup, records_for
from tuning.records import RecordFile, file_name, merge, prune, refusal


def test_round_trip(tmp_path, record, target):
    file = RecordFile.of(tmp_path, target.key)
    file.append(record)
    again = RecordFile.of(tmp_path, target.key)
    assert again.records == [record] and not again.damage
    assert again.path.read_text().count("\n") == 1


def test_torn_last_line_is_reported_and_sealed_off(tmp_path, record):
    path = tmp_path / "r.jsonl"
    RecordFile(path).append(record)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    file = RecordFile(path)
    assert file.records == [record]
    assert [d.line for d in file.damage] == [2] and "torn" in file.damage[0].reason
    file.append(replace(record, seconds=3e-6))
    again = RecordFile(path)
    assert [r.seconds for r in again.records] == [1e-6, 3e-6]
    assert len(again.damage) == 1 and "unreadable" in again.damage[0].reason


def test_a_line_without_its_newline_that_parses_is_kept_once(tmp_path):
    path = tmp_path / "r.jsonl"
    journal.append(path, {"a": 1})
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    journal.append(path, {"a": 2})
    entries, damage = journal.read(path)
    assert entries == [(1, {"a": 1}), (2, {"a": 2})] and not damage


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": "llvm/x86-64/other"}, "made for target llvm/x86-64/other"),
        ({"kernel": {"revision": "000000000000"}}, "made for revision 000000000000"),
        ({"kernel": {"template": "neon"}}, "made for template neon"),
        ({"kernel": {"spec": LinearSpec("amxfp4", 112, 64, INT8, m=1)}}, "made for kernel"),
        ({"kernel": {"rows": 8}}, "made for kernel"),
        ({"knobs": {"prefetching": 1}}, "unknown knob 'prefetching'"),
        ({"knobs": {"prefetch": "far"}}, "knob prefetch is 'far'"),
        ({"knobs": {"prefetch": -64}}, "knob prefetch is -64"),
        ({"knobs": {"prefetch": True}}, "knob prefetch is True"),
        ({"knobs": {"prefetch": 512}}, "its trace decides {'prefetch': 1024}"),
        ({"trace": [[], []]}, "its trace decides {}"),
        ({"trace": "none"}, "its trace does not replay"),
        ({"check": {"error": 0.5, "limit": 1e-5}}, "numeric check did not pass"),
        ({"check": {"error": float("nan"), "limit": 1e-5}}, "numeric check did not pass"),
        ({"check": {}}, "numeric check did not pass"),
    ],
)
def test_refusals_name_the_reason(tmp_path, record, target, kernel, spec, change, reason):
    change = {k: replace(record.kernel, **v) if k == "kernel" else v for k, v in change.items()}
    edited = replace(record, **change)
    assert refusal(record, target.key, kernel) is None
    assert reason in refusal(edited, target.key, kernel)
    path = tmp_path / "r.jsonl"
    RecordFile(path).append(edited)
    assert Lookup(path, target)(spec) is None


def test_unknown_schema_and_fields_are_no_records(tmp_path, record):
    path = tmp_path / "r.jsonl"
    for change in ({"schema": 99}, {"color": "red"}, {"kernel": {"n": 1}}):
        journal.append(path, {**record.to_json(), **change})
    short = record.to_json()
    del short["seconds"]
    journal.append(path, short)
    file = RecordFile(path)
    assert not file.records and [d.line for d in file.damage] == [1, 2, 3, 4]
    assert "schema 99" in file.damage[0].reason and "color" in file.damage[1].reason
    assert "seconds" in file.damage[3].reason


def test_lookup_takes_the_largest_gain_that_fits(tmp_path, record, target, spec):
    path = tmp_path / file_name(target.key)
    file = RecordFile(path)
    stale = replace(record.kernel, revision="000000000000")
    file.append(replace(record, kernel=stale, ratio=(0.1, 0.1, 0.1), **edit(512)))
    file.append(replace(record, ratio=(0.8, 0.9, 0.95), **edit(2048)))
    file.append(record)
    lookup = records_for(tmp_path, target)
    assert lookup(spec) == {"prefetch": 1024}
    assert lookup(LinearSpec("amxfp4", 96, 64, INT8, m=1, bias=True)) is None
    assert [why for _, why in lookup.refused if "revision" in why]


def test_files_of_other_targets_are_refused(tmp_path, record, target):
    path = tmp_path / "r.jsonl"
    RecordFile(path).append(replace(record, target="llvm/x86-64/other"))
    with pytest.raises(TuningError, match="made for llvm/x86-64/other"):
        records_for(path, target)
    with pytest.raises(TuningError, match="no tuning records"):
        records_for(tmp_path / "missing", target)
    assert records_for(False, target) is None


def test_merge_and_prune(tmp_path, record):
    a, b, out = (tmp_path / f"{n}.jsonl" for n in "abo")
    RecordFile(a).append(record)
    RecordFile(b).append(record)
    RecordFile(b).append(replace(record, ratio=(0.2, 0.3, 0.4)))
    assert len(merge([a, b], out).records) == 2
    assert prune(out) == 1
    assert [r.ratio[1] for r in RecordFile(out).records] == [0.3]
    changed = replace(record.kernel, revision="000000000000")
    assert prune(out, {record.kernel.problem: changed}) == 1
    RecordFile(a).append(replace(record, target="llvm/x86-64/other"))
    with pytest.raises(TuningError, match="several targets"):
        merge([a, b], out)


def test_identity_follows_the_code(spec, kernel, target):
    assert identity(spec, target.tvm, target.layout) == kernel
    assert KernelId.from_json(json.loads(json.dumps(kernel.to_json()))) == kernel
    other = identity(LinearSpec("amxfp4", 96, 64, INT8, m=2), target.tvm, target.layout)
    assert other.revision != kernel.revision
