"""`amx-tvm bench`: its numbers are consistent with each other and with the artifact."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from amx_tvm.artifact import Manifest
from amx_tvm.bench import measure as bench
from amx_tvm.bench import memory as bench_memory
from amx_tvm.cli.app import app
from amx_tvm.errors import GenerationError

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    import toy_artifact

    return toy_artifact.shared(tmp_path_factory)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    """400 MB are for measurements."""
    whole = bench_memory.read_bandwidth
    monkeypatch.setattr(bench_memory, "read_bandwidth", lambda n: whole(n, megabytes=8, repeats=3))


def test_json_holds_every_combination(artifact):
    options = "--prompt 20 --context 8 --context 40 --batch 1 --batch 3 --steps 2 --repeats 2"
    done = CliRunner().invoke(app, ["bench", str(artifact), *options.split(), "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [(r["context"], r["batch"]) for r in data["decode"]] == [
        (8, 1),
        (8, 3),
        (40, 1),
        (40, 3),
    ]
    assert [r["tokens"] for r in data["prefill"]] == [20]
    for row in data["prefill"] + data["decode"]:
        low, high = row["quartiles"]
        assert 0 < low <= row["tokens_per_s"] <= high
    for row in data["decode"]:
        moved = row["tokens_per_s"] * row["bytes_per_token"]
        assert row["gb_per_s"] == pytest.approx(moved / 1e9)
        assert row["share"] == pytest.approx(moved / data["read_bandwidth"])
    one, three = data["decode"][:2]
    assert three["bytes_per_token"] < one["bytes_per_token"]  # the batch shares the weights
    assert data["load_s"] > 0 and data["peak_bytes"] > 1 << 20


def test_tables(artifact):
    options = "--prompt 8 --context 8 --batch 2 --steps 2 --repeats 1"
    done = CliRunner().invoke(app, ["bench", str(artifact), *options.split()])
    assert done.exit_code == 0, done.output
    for words in ("memory reads", "Prefill", "Decode", "peak memory"):
        assert words in done.stdout


def test_wrong_numbers_are_named(artifact):
    with pytest.raises(GenerationError, match=r"batch is \[0\]"):
        bench.bench(artifact, batches=(0,))
    with pytest.raises(GenerationError, match="context"):
        bench.bench(artifact, contexts=(100_000,))


def test_an_untied_embedding_is_not_read_by_a_step(artifact):
    manifest = Manifest.load(artifact)
    everything = sum(tensor.bytes for tensor in manifest.parameters.tensors.values())
    tables = [n for n in manifest.parameters.tensors if "embed_tokens" in n]
    manifest.model["config"]["tie_word_embeddings"] = True
    assert bench.weight_bytes(manifest) == everything
    manifest.model["config"]["tie_word_embeddings"] = False
    tied = sum(manifest.parameters.tensors[name].bytes for name in tables)
    assert bench.weight_bytes(manifest) == everything - tied


def test_peak_memory_sees_what_was_written():
    before = bench_memory.peak_memory()
    block = np.ones(before + (32 << 20), np.uint8)
    assert bench_memory.peak_memory() >= block.nbytes
