"""Models that cannot be compiled: one line that names the trouble, code 2, nothing left behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


@pytest.fixture
def model(tmp_path):
    from tiny_model import write_model

    return write_model(tmp_path / "model")


def change_config(model, **changes):
    file = model / "config.json"
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def change_weights(model, change):
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors")


def poison(weights):
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan


def truncate(file, size):
    with open(file, "r+b") as opened:
        opened.truncate(size)


CASES = {
    "missing weights": (lambda m: (m / "model.safetensors").unlink(), ["safetensors"]),
    "truncated weights": (lambda m: truncate(m / "model.safetensors", 5000), ["safetensors"]),
    "missing config": (lambda m: (m / "config.json").unlink(), ["config.json"]),
    "config lacks a field": (lambda m: change_config(m, hidden_size=None), ["hidden_size"]),
    "unknown architecture": (
        lambda m: change_config(m, architectures=["MambaForCausalLM"], model_type="mamba"),
        ["amba"],
    ),
    "lacks a tensor": (
        lambda m: change_weights(m, lambda w: w.pop("model.layers.0.mlp.up_proj.weight")),
        ["model.layers.0.mlp.up_proj"],
    ),
    "NaN": (lambda m: change_weights(m, poison), ["nan", "layers.1.mlp.down_proj"]),
    "GGUF without content": (
        lambda m: (m.parent / "model" / "x.gguf").write_bytes(b"GGUF"),
        ["x.gguf"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_left(run, model, tmp_path, case):
    damage, words = CASES[case]
    damage(model)
    source = model / "x.gguf" if "GGUF" in case else model
    code, out, err = run("compile", source, "-o", tmp_path / "out" / "artifact", "-q")
    assert code == 2 and out == "", err
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_no_empty_line_in_front(run, tmp_path):
    """Of progress that a pipe does not show."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    code, _, err = run("compile", tmp_path / "x.gguf", "-o", tmp_path / "out")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
