from __future__ import annotations

import json
import resource
from dataclasses import replace

import pytest
from tuning_points import edit

from amx_tvm.errors import TuningError
from relax_passes.activation import INT8
from relax_passes.spec import LinearSpec
from tuning import journal, kernels
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
        ({"trace": [[], []]}, "its trace does not replay"),
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


@pytest.mark.parametrize("decision", [-1, 5, 1 << 70, 0.0, True, None, [0]], ids=str)
def test_decisions_that_nobody_made_end_no_process(record, target, decision):
    """TVM reads its values' memory wherever a decision points."""
    trace = json.loads(json.dumps(record.trace))
    trace[1][0][1] = decision
    assert "does not replay" in refusal(replace(record, trace=trace), target.key)


@pytest.mark.parametrize("change", ["kind", "more", "value", "weight", "block"])
def test_traces_of_other_instructions_are_not_given_to_tvm(record, target, change):
    trace = json.loads(json.dumps(record.trace))
    instructions = trace[0]
    if change == "kind":
        instructions[0][0] = "EnterPostproc"
    elif change == "more":
        instructions.append(["ComputeInline", ["b0"], [], []])
    elif change == "value":
        instructions[1][2][0][0] = 2**31
    elif change == "weight":
        instructions[1][2][1] = []
    else:
        instructions[2][1][0] = "b7"
    assert "does not replay" in refusal(replace(record, trace=trace), target.key)


NONSENSE = [None, True, -1, 1 << 70, 0.5, float("nan"), "x", [], [1], {}, {"a": 1}, ["x"] * 3]
FIELDS = ["rows", "seconds", "spread", "ratio", "check", "trace", "knobs", "kernel", "target"]


@pytest.mark.parametrize("name", [*FIELDS, "kernel.spec", "kernel.rows", "spec.k", "spec.format"])
def test_a_damaged_field_is_named_and_skipped(tmp_path, record, target, spec, name):
    """Whatever stands in a field, the good line behind it is found."""
    path = tmp_path / file_name(target.key)
    *outer, field = name.split(".")
    for value in NONSENSE:
        line = record.to_json()
        place = line
        for step in {"kernel": ["kernel"], "spec": ["kernel", "spec"]}.get("".join(outer), []):
            place = place[step]
        place[field] = value
        path.write_text(json.dumps(line) + "\n" + json.dumps(record.to_json()) + "\n")
        file = RecordFile(path)
        assert [d.line for d in file.damage] in ([], [1]) and record in file.records
        if file.damage:
            assert field in str(file.damage[0])
        if name != "target":  # a file of another target is refused as a whole
            assert Lookup(path, target)(spec) == record.knobs


@pytest.mark.parametrize(
    "line",
    [b'{"a":' * 5000 + b"1" + b"}" * 5000, b"\x00" * 4096, b"\xff\x01" * 50, b"7", b'"\\ud800"'],
    ids=["deep", "nul", "binary", "number", "surrogate"],
)
def test_lines_of_nonsense_are_named_and_skipped(tmp_path, line):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    entries, damage = journal.read(path)
    assert [entry for _, entry in entries] == [{"a": 1}, {"a": 2}]
    assert [d.line for d in damage] == [2] and "unreadable" in damage[0].reason


def test_a_full_disk_takes_no_part_of_a_line(tmp_path):
    path = tmp_path / "r.jsonl"
    journal.append(path, {"a": 1})
    whole = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, before[1]))
    try:
        with pytest.raises(TuningError, match=f"cannot write {path}: No space.* are free"):
            journal.append(path, {"a": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole
    (tmp_path / "file").write_text("x")
    with pytest.raises(TuningError, match="cannot write .*file/r.jsonl: "):
        journal.append(tmp_path / "file" / "r.jsonl", {"a": 1})
    with pytest.raises(TuningError, match="cannot write .*file: "):
        journal.lock(tmp_path / "file" / "r.jsonl")


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


def test_a_revision_is_no_matter_of_pythons_version():
    """TVM prints variables of shapes as Python 3.12 writes them where it runs there."""
    old = (
        '# from typing import TypeVar\n# from tvm.script import tirx as T\n\nm = TypeVar("m")\n'
        '@T.prim_func(private=True)\ndef main(x: T.Buffer((m, 4), "float16")):\n    pass\n'
    )
    new = (
        "from __future__ import annotations\n\n# from tvm.script import tirx as T\n\n"
        '@T.prim_func(private=True)\ndef main[m](x: T.Buffer((m, 4), "float16")):\n    pass\n'
    )
    assert kernels._plain(new) == old == kernels._plain(old)
