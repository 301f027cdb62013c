"""4-bit checkpoints of other tools: the codes and scales that they store are the ones compiled."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import amx_tvm
from amx_tvm import formats
from amx_tvm.errors import ModelError
from amx_tvm.frontends import open_model
from amx_tvm.frontends.family_source import FamilySource
from amx_tvm.models import find

from . import tiny


def packed(codes):
    return codes[..., 0::2] | codes[..., 1::2] << 4


def written(directory, tensors, config, quantization, metadata=None):
    """Write a checkpoint; arrays in e4m3 or e8m0 are given as bytes and named so in the header."""
    save_file(tensors, directory / "model.safetensors", metadata=metadata)
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for name, entry in header.items():
        if name.endswith("_scale") and entry.get("dtype") == "U8":
            entry["dtype"] = "F8_E4M3" if quantization.get("e4m3") else "F8_E8M0"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    described = {k: v for k, v in quantization.items() if k != "e4m3"}
    values = {**config, "quantization_config": described} if described else config
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def same_bits(source, expected):
    for name, q in expected.items():
        raw = source.load_raw(name)
        assert raw.format.name == q.format.name and source.shape(name) == q.codes.shape
        np.testing.assert_array_equal(raw.codes, q.codes)
        np.testing.assert_array_equal(raw.scales["scale"], q.scales["scale"])
        np.testing.assert_allclose(source.load(name), q.format.dequantize(q), rtol=3e-7)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    place = tiny.save(tiny.make("llama"), tmp_path_factory.mktemp("llama") / "model")
    return load_file(place / "model.safetensors"), json.loads((place / "config.json").read_text())


@pytest.mark.parametrize("described_in", ["config.json", "hf_quant_config.json"])
def test_modelopt(llama, described_in, tmp_path):
    fmt, expected, tensors = formats.get("nvfp4"), {}, {}
    for name, value in llama[0].items():
        tensors[name] = value
        if name.endswith("_proj.weight"):
            q = expected[name] = fmt.quantize(value)
            tensors[name] = packed(q.codes)
            tensors[f"{name}_scale"] = q.scales["scale"]
            tensors[f"{name}_scale_2"] = np.asarray(q.tensor_scale)
            tensors[name.replace("weight", "input_scale")] = np.ones((), np.float32)
    algorithm = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    inside = described_in == "config.json"
    quantization = {"quant_method": "modelopt", **algorithm} if inside else {}
    written(tmp_path, tensors, llama[1], {**quantization, "e4m3": True})
    if not inside:
        text = {"producer": {"name": "modelopt"}, "quantization": algorithm}
        (tmp_path / described_in).write_text(json.dumps(text))
    source = open_model(tmp_path)
    assert sorted(source.names()) == sorted(llama[0])
    same_bits(source, expected)
    assert float(source.load_raw(next(iter(expected))).tensor_scale) == float(
        next(iter(expected.values())).tensor_scale
    )


@pytest.mark.parametrize("name, kind", [("mxfp4", "MXTensor"), ("nvfp4", "NVFP4Tensor")])
def test_torchao(llama, name, kind, tmp_path):
    fmt, expected, tensors, metadata = formats.get(name), {}, {}, {}
    for key, value in llama[0].items():
        if not key.endswith("_proj.weight"):
            tensors[key], metadata[key] = value, json.dumps({"_type": "Tensor"})
            continue
        q = expected[key] = fmt.quantize(value)
        stem = key.replace(".weight", "._weight")
        tensors[f"{stem}_qdata"] = packed(q.codes)
        tensors[f"{stem}_scale"] = q.scales["scale"]
        if name == "nvfp4":
            tensors[f"{stem}_per_tensor_scale"] = np.asarray(q.tensor_scale)
        metadata[key] = json.dumps({"_type": kind, "_data": {"is_swizzled_scales": False}})
    metadata["tensor_names"] = json.dumps(list(llama[0]))
    quantization = {"quant_method": "torchao", "e4m3": name == "nvfp4"}
    source = open_model(written(tmp_path, tensors, llama[1], quantization, metadata))
    assert sorted(source.names()) == sorted(llama[0])
    same_bits(source, expected)


def test_torchao_refuses_what_it_cannot_read(llama, tmp_path):
    tensors = {"model.embed_tokens._weight_qdata": np.zeros((4, 16), np.uint8)}
    swizzled = {"_type": "MXTensor", "_data": {"is_swizzled_scales": True}}
    for data, word in (({"_type": "Int8Tensor"}, "Int8Tensor"), (swizzled, "swizzled")):
        metadata = {"model.embed_tokens.weight": json.dumps(data)}
        written(tmp_path, tensors, llama[1], {"quant_method": "torchao"}, metadata)
        with pytest.raises(ModelError, match=word):
            open_model(tmp_path)


def test_torchao_itself(llama, tmp_path):
    """What the package writes today, where it is installed."""
    pytest.importorskip("torchao")
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    from safetensors.torch import save_file as save_torch

    weights = {k: torch.from_numpy(v) for k, v in llama[0].items()}
    for key, value in weights.items():
        if key.endswith("_proj.weight"):
            weights[key] = mx.MXTensor.to_mx(value.bfloat16(), torch.float4_e2m1fn_x2, 32)
    tensors, metadata = support.flatten_tensor_state_dict(weights)
    save_torch(tensors, tmp_path / "model.safetensors", metadata=metadata)
    values = {**llama[1], "quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    source = open_model(tmp_path)
    for key, value in weights.items():
        if key.endswith("_proj.weight"):
            np.testing.assert_array_equal(source.load(key), value.dequantize().float().numpy())


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A tiny gpt-oss with experts in MXFP4 as its checkpoints store them, and torch's model."""
    model = tiny.make("gpt_oss")
    place = tiny.save(model, tmp_path_factory.mktemp("gpt_oss") / "model")
    fmt, tensors, expected = formats.get("mxfp4"), {}, {}
    for name, value in load_file(place / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value
            continue
        rows = np.ascontiguousarray(value.swapaxes(1, 2))  # [experts, N, K]
        q = expected[name] = fmt.quantize(rows)
        experts, n, k = rows.shape
        tensors[f"{name}_blocks"] = packed(q.codes).reshape(experts, n, k // 32, 16)
        tensors[f"{name}_scales"] = q.scales["scale"]
        with torch.no_grad():
            rounded = fmt.dequantize(q).swapaxes(1, 2)
            model.get_parameter(name).copy_(torch.from_numpy(rounded.copy()))
    config = json.loads((place / "config.json").read_text())
    written(place, tensors, config, {"quant_method": "mxfp4"})
    return model, place, expected


def test_gpt_oss_experts_keep_their_bits(gpt_oss):
    _, place, expected = gpt_oss
    source = open_model(place)
    decoder = find(source.config).configure(source.config)
    stem = "model.layers.1.mlp.experts"
    wanted = [f"{stem}.3.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
    named = FamilySource(source, find(source.config), decoder, wanted)
    up, down = expected[f"{stem}.gate_up_proj"], expected[f"{stem}.down_proj"]
    rows = [up.codes[3, 0::2], up.codes[3, 1::2], down.codes[3]]
    scales = [up.scales["scale"][3, 0::2], up.scales["scale"][3, 1::2], down.scales["scale"][3]]
    for name, codes, scale in zip(wanted, rows, scales, strict=True):
        raw = named.load_raw(name)
        assert raw.format.name == "mxfp4" and named.shape(name) == codes.shape
        np.testing.assert_array_equal(raw.codes, codes)
        np.testing.assert_array_equal(raw.scales["scale"], scale)
        np.testing.assert_array_equal(named.load(name), raw.format.dequantize(raw))


def test_gpt_oss_compiles_without_another_rounding(gpt_oss, tmp_path):
    model, place, _ = gpt_oss
    config = amx_tvm.QuantizationConfig(
        format="none",
        activation="float32",
        head="none",
        overrides={"*.experts.*": "mxfp4"},
    )
    artifact = amx_tvm.compile(place, quantization=config, output=tmp_path / "out")
    linears = artifact.manifest.linears
    assert {e["spec"]["format"] for e in linears if ".experts." in e["name"]} == {"mxfp4"}
    assert {e["spec"]["format"] for e in linears if ".experts." not in e["name"]} == {"none"}
    ids = np.random.default_rng(2).integers(3, tiny.VOCAB, 20).tolist()
    got = np.asarray(amx_tvm.load(artifact.path).logits(ids))
    assert tiny.relative_error(got, tiny.logits(model, ids)) < 1e-4
