"""A real tune of a tiny configuration through the command line, and its record in `compile`."""

from __future__ import annotations

import json

import pytest
from tuning_points import edit

from amx_tvm.cli import main
from amx_tvm.targets import resolve
from tuning import journal
from tuning.kernels import KernelId
from tuning.records import Record, RecordFile, file_name
from tuning.tasks import tasks_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,  # down is then the kernel that o is
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code


def test_tasks_from_a_configuration_alone(target):
    tasks = tasks_of(CONFIG, target)
    decode = [t for t in tasks if t.spec.m == 1]
    assert sum(t.decode for t in decode) == 2 * 4 + 1  # q+k+v, o, gate+up, down; the head
    assert {t.decode for t in decode} == {1, 2, 4}
    assert all(t.prefill and not t.decode for t in tasks if t.spec.m is None)


def test_tune_command_and_records(tmp_path, target, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    where = tmp_path / "records"
    code = run("tune", tmp_path, "--trials", 2, "--records", where, "--threads", 1)
    done = capsys.readouterr()
    assert code == 0 and "2 new trials" in done.err
    log = where / file_name(target.key).replace(".jsonl", ".trials.jsonl")
    entries = [e for _, e in journal.read(log)[0]]
    trials = [e for e in entries if e["phase"] == "trial"]
    assert len(trials) == 2 and {e["state"] for e in trials} == {"ok"}
    assert all(e["seconds"] > 0 for e in trials)

    kernel = KernelId.from_json(entries[0]["kernel"])
    path = where / file_name(target.key)
    path.unlink(missing_ok=True)
    record = Record(
        target=target.key,
        kernel=kernel,
        **edit(8192),
        rows=(1,),
        seconds=1e-6,
        default_seconds=2e-6,
        spread=(1e-6, 1e-6),
        ratio=(0.5, 0.5, 0.5),
        check={"error": 1e-7, "limit": 1e-5},
    )
    RecordFile(path).append(record)
    assert run("tune", "verify", path) == 0
    assert "ok: " + kernel.text in capsys.readouterr().out
    journal.append(path, {**record.to_json(), "knobs": {"prefetch": "far"}})
    assert run("tune", "verify", path) == 1
    assert "refused" in capsys.readouterr().out
    assert run("tune", "verify", path, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [bool(row["refused"]) for row in found["records"]] == [False, True]
    assert run("tune", "show", path) == 0 and run("tune", "list", where) == 0
    assert "prefetch=8192" in capsys.readouterr().out
    assert run("tune", "prune", path) == 0
    assert RecordFile(path).records == [record]


def test_heads_that_no_gpu_kernel_takes_go_to_tvms_attention():
    """Their cache is made by TVM's own code, inside the function that is being rebuilt."""
    config = {**CONFIG, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert tasks_of(config, resolve("cuda:sm_80"))
