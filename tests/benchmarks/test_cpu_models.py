"""The model benchmark: its random model is readable by both sides, its ratios are right."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cpu_models_report as report  # noqa: E402
import random_llama  # noqa: E402

from amx_tvm.frontends import open_model  # noqa: E402

SMALL = random_llama.SHAPE | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 96,
}


def test_both_files_hold_the_same_weights(tmp_path):
    paths = random_llama.make(tmp_path, SMALL, 4096)
    exact = open_model(paths["hf"])
    assert exact.config["hidden_size"] == 64
    for kind, error in (("q4_0", 0.12), ("mxfp4", 0.2)):
        rounded = open_model(paths[kind])
        for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
            a, b = exact.load(name), rounded.load(name)
            assert a.shape == b.shape
            assert 0 < np.linalg.norm(a - b) / np.linalg.norm(a) < error


def row(case, contender, seconds, tokens=8, **ask):
    return {
        "model": "llama-1b", "threads": 2, "case": case, "contender": contender,
        "tokens": tokens, "seconds": seconds, "read_bandwidth": 1e9, "ask": ask,
        "facts": {"weight_bytes": 4_000_000, "kv_bytes": 1000},
    }  # fmt: skip


def test_table_takes_ratios_repeat_by_repeat():
    one = {"context": 128, "batch": 1, "steps": 8}
    rows = [
        row("decode 128", "amxfp4", [1.0, 2.0, 4.0], **one),
        row("decode 128", "llama.cpp Q4_0", [2.0, 4.0, 8.0], **one),
        row("decode 128", "llama.cpp MXFP4", [3.0, 5.0, 9.0], **one),
        row("decode 8 x 128", "amxfp4", [2.0, 4.0, 8.0], tokens=64, **one | {"batch": 8}),
    ]
    assert report.quartiles(rows[1], rows[0]) == (2.0, 2.0, 2.0)
    text = report.table(rows)
    assert "| 4.0 | llama.cpp Q4_0, decode 128 | 2.0 | 2.00 (2.00-2.00) | 1.15 |" in text
    assert "MXFP4" not in text  # the better peer counts
    assert "4.00 (4.00-4.00) | 3 |" in text  # eight sequences against one
    # 4 tokens/s of 4 MB of weights and 132 cached tokens of 1000 bytes, out of 1 GB/s
    assert report.share(rows[0]) == pytest.approx(4 * (4_000_000 + 132_000) / 1e9)
