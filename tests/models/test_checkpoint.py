"""Quantized checkpoints: the round trip keeps every bit; compressed-tensors layouts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from amx_tvm import formats
from amx_tvm.cli import main
from amx_tvm.compiler.checkpoint import quantize_checkpoint
from amx_tvm.errors import ArtifactError
from amx_tvm.frontends import open_model

from . import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save(tiny.make("llama"), tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("name", ["amxfp4", "amxfp4-e4m3-tensor", "nvfp4", "int4"])
def test_stored_weights_are_the_quantized_ones(saved, name, tmp_path):
    source = open_model(saved)
    again = open_model(quantize_checkpoint(saved, tmp_path / "out", name))
    assert set(again.names()) == set(source.names())
    for weight in source.names():
        linear = weight.endswith("_proj.weight")
        head = weight in ("lm_head.weight", "model.embed_tokens.weight")
        if not (linear or head):
            np.testing.assert_array_equal(again.load(weight), source.load(weight))
            continue
        fmt = formats.get("int8" if head else name)
        expected, raw = fmt.quantize(source.load(weight)), again.load_raw(weight)
        assert raw.format.name == fmt.name and again.shape(weight) == source.shape(weight)
        np.testing.assert_array_equal(raw.codes, expected.codes)
        for key, scales in expected.scales.items():
            np.testing.assert_array_equal(raw.scales[key], scales)
        np.testing.assert_array_equal(again.load(weight), fmt.dequantize(expected))


def test_compiles_to_the_same_parameters(saved, tmp_path, compile_parameters, capsys):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(SystemExit, match="0"):
        main(["quantize", str(saved), "--output", str(checkpoint), "--json"])
    made = json.loads(capsys.readouterr().out)
    assert Path(made["path"]) == checkpoint and made["quantization"] == "amxfp4"
    assert made["bytes"] == (checkpoint / "model.safetensors").stat().st_size
    digests = []
    for number, model in enumerate((saved, checkpoint)):
        out = Path(compile_parameters(model, output=tmp_path / str(number)).path)
        shards = sorted((out / "params").iterdir())
        digests.append([hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_compressed_tensors(saved, name, tmp_path):
    fmt, expected, tensors = formats.get(name), {}, {}
    for key, value in load_file(saved / "model.safetensors").items():
        if not key.endswith("_proj.weight"):
            tensors[key] = value
            continue
        q = fmt.quantize(value)
        expected[key] = fmt.dequantize(q)
        tensors[f"{key}_packed"] = q.codes[:, 0::2] | q.codes[:, 1::2] << 4
        tensors[f"{key}_scale"] = q.scales["scale"]
        if q.tensor_scale is not None:
            tensors[f"{key}_global_scale"] = np.float32(1) / np.reshape(q.tensor_scale, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": f"{name}-pack-quantized",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_model(tmp_path)
    assert sorted(expected) == sorted(n for n in source.names() if n.endswith("_proj.weight"))
    for key, values in expected.items():
        assert source.dtype(key) == name
        np.testing.assert_allclose(source.load(key), values, rtol=3e-7)


def test_an_existing_directory_is_refused(saved, tmp_path):
    with pytest.raises(ArtifactError, match="exists already"):
        quantize_checkpoint(saved, tmp_path)


def test_the_documented_reader(saved, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    place = quantize_checkpoint(saved, tmp_path / "out")
    read, source = names["read"](place), open_model(place)
    assert sorted(read) == sorted(source.names())
    for name, values in read.items():
        np.testing.assert_array_equal(values, source.load(name))
