"""Hugging Face directories: values, shards, and everything that can be wrong with the files."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amx_tvm.errors import ModelError
from amx_tvm.frontends import open_model
from amx_tvm.frontends.hf.safetensors_file import SafetensorsFile

from .conftest import CONFIG, TYPES, one_line, write_safetensors

INDEX = "model.safetensors.index.json"


def edit_config(directory, **changes):
    config = {**CONFIG, **changes}
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )


def fails(directory, *parts):
    with pytest.raises(ModelError) as caught:
        open_model(directory)
    message = one_line(caught.value)
    for part in parts:
        assert part in message
    return message


def shard(directory, tensors):
    """Turn the single file into two shards with an index."""
    (directory / "model.safetensors").unlink()
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[:1], names[1:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_are_read_exactly(model_dir, tensors, sharded):
    if sharded:
        shard(model_dir, tensors)
    source = open_model(str(model_dir))
    assert sorted(source.names()) == sorted(tensors)
    for name, (dtype, values) in tensors.items():
        loaded = source.load(name)
        assert loaded.dtype == np.float32 and loaded.flags.c_contiguous
        np.testing.assert_array_equal(loaded, values.astype(TYPES[dtype]).astype(np.float32))
        assert source.shape(name) == values.shape and source.dtype(name) == dtype.lower()
    assert source.nbytes == 64 * 32 * 2 + 32 * 4 + 64 * 32 * 2
    assert source.config["tie_word_embeddings"] is False
    assert source.generation_config["eos_token_id"] == [2]
    assert source.load_raw("model.norm.weight") is None


def test_files_of_the_safetensors_library_are_read(model_dir):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    every_bfloat16 = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16)
    save_file({"all": every_bfloat16.reshape(256, 256)}, model_dir / "model.safetensors")
    loaded = open_model(model_dir).load("all")
    expected = every_bfloat16.float().reshape(256, 256).numpy()
    np.testing.assert_array_equal(loaded.view(np.uint32), expected.view(np.uint32))


def test_loading_caches_nothing(model_dir):
    source = open_model(model_dir)
    first = source.load("model.norm.weight")
    first[:] = 0
    assert source.load("model.norm.weight").any()


def test_head_that_is_missing_means_tied(model_dir, tensors):
    del tensors["lm_head.weight"]
    write_safetensors(model_dir / "model.safetensors", tensors)
    assert open_model(model_dir).config["tie_word_embeddings"] is True


def test_rope_parameters_become_theta_and_scaling(model_dir):
    scaling = {"rope_type": "llama3", "factor": 8.0}
    edit_config(model_dir, rope_parameters={"rope_theta": 500000.0, **scaling})
    config = open_model(model_dir).config
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"] == scaling
    edit_config(model_dir, rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    assert open_model(model_dir).config["rope_scaling"] is None


def test_generation_config_and_config_name_ends(model_dir):
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [5, 7], "bos_token_id": 1}')
    generation = open_model(model_dir).generation_config
    assert generation["eos_token_id"] == [5, 7, 2] and generation["bos_token_id"] == 1


def test_digest_follows_the_content(model_dir, tensors):
    before = open_model(model_dir).digest()
    assert before == open_model(model_dir).digest()
    tensors["model.norm.weight"][1][3] += 1
    write_safetensors(model_dir / "model.safetensors", tensors)
    assert open_model(model_dir).digest() != before


@pytest.mark.parametrize(
    "field", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
)
def test_missing_config_field_is_named(model_dir, field):
    edit_config(model_dir, **{field: None})
    fails(model_dir, repr(field), "config.json")


def test_config_without_architecture(model_dir):
    edit_config(model_dir, architectures=None, model_type=None)
    fails(model_dir, "architectures", "model_type")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_config_that_is_no_object(model_dir, text):
    (model_dir / "config.json").write_text(text)
    fails(model_dir, "config.json")


def test_quantized_checkpoint_is_refused_by_name(model_dir):
    edit_config(model_dir, quantization_config={"quant_method": "gptq"})
    fails(model_dir, "gptq", "unquantized")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.floats(0, 1, exclude_max=True))
def test_truncated_file_at_any_byte(model_dir, tmp_path, kept):
    whole = (model_dir / "model.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ModelError) as caught:
        SafetensorsFile(cut)
    assert "truncated" in one_line(caught.value) or "empty" in str(caught.value)


def test_truncated_shard_is_named(model_dir, tensors):
    shard(model_dir, tensors)
    path = model_dir / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    fails(model_dir, path.name, "truncated")


def test_missing_shard_is_named(model_dir, tensors):
    shard(model_dir, tensors)
    (model_dir / "model-00002-of-00002.safetensors").unlink()
    fails(model_dir, "model-00002-of-00002.safetensors", "2 shards")


def test_shard_without_a_promised_tensor(model_dir, tensors):
    shard(model_dir, tensors)
    name = "model-00001-of-00002.safetensors"
    write_safetensors(model_dir / name, {"other": ("F32", np.zeros(2))})
    fails(model_dir, "model.embed_tokens.weight", name)


def test_directory_without_weights(model_dir):
    (model_dir / "model.safetensors").unlink()
    fails(model_dir, "no weights", "model.safetensors")


def test_shards_without_their_index(model_dir, tensors):
    shard(model_dir, tensors)
    (model_dir / INDEX).unlink()
    fails(model_dir, INDEX)


def rewrite_header(directory, change):
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])


def refused_when_needed(model_dir, dtype):
    """A type that is not read stops only who needs the tensor, before any work."""
    source = open_model(model_dir)
    with pytest.raises(ModelError) as caught:
        source.check("model.norm.weight")
    assert "model.norm.weight" in one_line(caught.value) and dtype in str(caught.value)


def test_unknown_type_is_named(model_dir):
    rewrite_header(model_dir, lambda h: h["model.norm.weight"].update(dtype="F9"))
    refused_when_needed(model_dir, "F9")


def test_eight_bit_weights_are_refused(model_dir):
    change = {"dtype": "F8_E4M3", "shape": [128]}
    rewrite_header(model_dir, lambda h: h["model.norm.weight"].update(change))
    refused_when_needed(model_dir, "F8_E4M3")


def test_shape_that_does_not_fit_its_bytes(model_dir):
    rewrite_header(model_dir, lambda h: h["model.norm.weight"].update(shape=[31]))
    fails(model_dir, "model.norm.weight", "[31]")


def test_integer_tensor_is_listed_but_no_weight(model_dir):
    write_safetensors(model_dir / "model.safetensors", {"ids": ("I64", np.arange(4))})
    source = open_model(model_dir)
    assert source.dtype("ids") == "i64"
    with pytest.raises(ModelError, match="I64"):
        source.load("ids")


def test_tensor_that_is_not_there(model_dir):
    with pytest.raises(ModelError, match="no tensor 'nothing'"):
        open_model(model_dir).load("nothing")


def test_not_a_safetensors_file(model_dir):
    (model_dir / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(1000))
    fails(model_dir, "model.safetensors")


HEADER = {
    "overlap": lambda h: h["model.norm.weight"].update(data_offsets=[4092, 4220]),
    "hole": lambda h: h["lm_head.weight"].update(data_offsets=[4228, 8324]),
    "metadata that is no text": lambda h: h.update(__metadata__={"x": [1]}),
    "offsets that are none": lambda h: h["model.norm.weight"].update(data_offsets="ab"),
    "three offsets": lambda h: h["model.norm.weight"]["data_offsets"].append(8192),
    "one offset": lambda h: h["model.norm.weight"]["data_offsets"].pop(),
    "a shape of texts": lambda h: h["model.norm.weight"].update(shape=["32"]),
    "no dtype": lambda h: h["model.norm.weight"].pop("dtype"),
    "no object": lambda h: h.update({"model.norm.weight": []}),
}


@pytest.mark.parametrize("name", HEADER)
def test_headers_are_read_as_strictly_as_the_reference_does(model_dir, name):
    from safetensors import SafetensorError
    from safetensors.numpy import load

    rewrite_header(model_dir, HEADER[name])
    content = (model_dir / "model.safetensors").read_bytes()
    if name == "hole":
        content += bytes(8)
        (model_dir / "model.safetensors").write_bytes(content)
    with pytest.raises(SafetensorError):
        load(content)
    fails(model_dir, "model.safetensors")


def test_bytes_of_no_tensor_and_names_that_stand_twice(model_dir):
    path = model_dir / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(8))
    fails(model_dir, "8 bytes behind its last tensor")
    twice = whole.replace(b'"model.norm.weight"', b'"lm_head.weight"   ', 1)
    path.write_bytes(twice)
    fails(model_dir, "'lm_head.weight' stands in one object twice")


OUT_OF_SENSE = {
    "rope_theta": (0, -5.0, 1e308, "10000", float("nan"), [1]),
    "rms_norm_eps": (-1.0, "x"),
    "head_dim": (100_000, 0),
    "hidden_size": (1 << 32, 32.5, True, {}),
    "vocab_size": (1 << 40, "64", -1),
    "num_hidden_layers": (1 << 40, 1_000_000, "1"),
    "num_attention_heads": (0, 1 << 20),
    "max_position_embeddings": (1 << 62, -1),
    "eos_token_id": ("2", [2, "</s>"], 1 << 70, {}),
    "architectures": (5, "LlamaForCausalLM", [1], {}),
    "model_type": ([], 3),
    "quantization_config": ("x", [1], {"quant_method": 3}, {"weights": []}),
    "rope_scaling": ("x", {"rope_type": 3}, {"rope_type": "linear", "factor": "2"}),
    "layer_types": ("full", [1]),
    "tie_word_embeddings": ("false",),
}


@pytest.mark.parametrize("field", OUT_OF_SENSE)
def test_values_out_of_sense_are_refused_by_their_field(model_dir, field):
    for value in OUT_OF_SENSE[field]:
        edit_config(model_dir, **{field: value})
        fails(model_dir, "config.json", field)


def test_text_among_the_ids_of_the_generation_config(model_dir):
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [1, "2"]}')
    with pytest.raises(ModelError, match="generation_config.json.*eos_token_id.*'2'"):
        _ = open_model(model_dir).generation_config


def test_deep_files_and_files_that_are_none(model_dir):
    for name in ("config.json", "model.safetensors.index.json", "generation_config.json"):
        shutil.copytree(model_dir, model_dir / "copy", ignore=shutil.ignore_patterns("copy"))
        copy = model_dir / "copy"
        if "index" in name:
            (copy / "model.safetensors").unlink()
        (copy / "tokenizer.json").write_text("{}")
        (copy / name).write_text('{"a":' * 100_000)
        with pytest.raises(ModelError, match=name):
            _ = open_model(copy).generation_config
        (copy / name).unlink()
        os.mkfifo(copy / name)
        with pytest.raises(ModelError):
            _ = open_model(copy).generation_config
        shutil.rmtree(copy)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../x", ""])
def test_an_index_names_files_of_its_directory(model_dir, tensors, name):
    shard(model_dir, tensors)
    index = json.loads((model_dir / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (model_dir / INDEX).write_text(json.dumps(index))
    fails(model_dir, INDEX, "weight_map.lm_head.weight", "inside the directory")
