"""A checkpoint means what its files say, all of them together: heads, prefixes, biases, buffers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import amx_tvm
from amx_tvm.compiler.checkpoint import quantize_checkpoint
from amx_tvm.errors import ModelError
from amx_tvm.frontends import open_model
from amx_tvm.frontends.checkpoint import identify, open_weights
from amx_tvm.models import families, find, moe
from tests.models import tiny

BUFFERS = {
    "model.layers.0.self_attn.bias": np.tril(np.ones((1, 1, 8, 8), bool)),
    "model.layers.0.self_attn.masked_bias": np.array(-1e9),
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    "model.embed_tokens.position_ids": np.arange(8)[None],
    "model.step": np.array(3, np.int16),
}
FAMILIES = sorted(family.name for family in families() if family.vision is None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function: family -> (tensors, configuration) of a tiny model of it."""
    made = {}

    def get(family):
        if family not in made:
            place = tiny.save(tiny.make(family), tmp_path_factory.mktemp(family))
            config = json.loads((place / "config.json").read_text())
            made[family] = load_file(place / "model.safetensors"), config
        tensors, config = made[family]
        return dict(tensors), json.loads(json.dumps(config))

    return get


def written(place, tensors, config):
    place.mkdir(exist_ok=True)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(config))
    words = {f"w{index}": index for index in range(tiny.VOCAB)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(place / "tokenizer.json"))
    return place


def weights_of(model):
    """Return every weight that the compiled module would get, as the compiler reads it."""
    source = open_model(model)
    family, decoder = identify(source)
    network = family.build(decoder)
    shapes = {n: tuple(int(v) for v in p.shape) for n, p in network.named_parameters()}
    named = open_weights(source, family, decoder, moe.unstacked(shapes, decoder)[0])
    return {name: named.load(name) for name in named.names()}


def refused(model):
    with pytest.raises(ModelError) as caught:
        weights_of(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same(one, other):
    assert sorted(one) == sorted(other)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_with_and_without_the_base_models_prefix(saved, family, tmp_path):
    tensors, config = saved(family)
    prefix = find(config).prefix
    bare = {name.removeprefix(prefix): values for name, values in tensors.items()}
    assert sorted(bare) != sorted(tensors)
    same(
        weights_of(written(tmp_path / "a", tensors, config)),
        weights_of(written(tmp_path / "b", bare, config)),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_that_are_no_weights_stop_nobody(saved, family, tmp_path):
    tensors, config = saved(family)
    plain = weights_of(written(tmp_path / "a", tensors, config))
    same(plain, weights_of(written(tmp_path / "b", {**tensors, **BUFFERS}, config)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_head_that_differs_is_used(saved, family, tmp_path):
    tensors, config = saved(family)
    table = next(n for n in tensors if n.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = tensors[table][::-1].copy()
    config["tie_word_embeddings"] = True
    got = weights_of(written(tmp_path / "a", tensors, config))
    np.testing.assert_array_equal(got["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_head_that_is_the_embedding_stays_tied(saved, family, tmp_path):
    tensors, config = saved(family)
    table = next(n for n in tensors if n.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = tensors[table].copy()
    config["tie_word_embeddings"] = True
    assert "lm_head.weight" not in weights_of(written(tmp_path / "a", tensors, config))
    del tensors[table]  # transformers 5 takes the one that is there
    got = weights_of(written(tmp_path / "a", tensors, config))
    np.testing.assert_array_equal(got["model.embed_tokens.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("kept", [("q", "k", "v", "o"), ("q", "k", "v"), ("k",), ("o",)])
def test_stored_biases_are_used_one_by_one(saved, kept, tmp_path):
    tensors, config = saved("llama")
    expected = {}
    for name in [n for n in tensors if n.endswith("_proj.bias")]:
        values = tensors.pop(name)
        part = name.split(".")[-2][0]
        if part in kept and not (part == "k" and ".0." in name and len(kept) == 1):
            tensors[name] = expected[name] = values
        elif part in "qkv" and set(kept) & set("qkv"):
            expected[name] = np.zeros_like(values)
    config["attention_bias"] = False
    got = weights_of(written(tmp_path / "a", tensors, config))
    biases = {name: values for name, values in got.items() if name.endswith(".bias")}
    same(biases, expected)


def test_another_head_biases_and_buffers_in_the_logits(saved, tmp_path):
    """What is compiled, and what is quantized and then compiled, is what torch computes."""
    model = tiny.make("llama")
    tensors, config = saved("llama")
    config |= {"attention_bias": False, "tie_word_embeddings": True}
    place = written(tmp_path / "a", {**tensors, **BUFFERS}, config)
    ids = list(range(3, 30))
    expected = tiny.logits(model, ids)
    quantized = quantize_checkpoint(place, tmp_path / "q", "int4")
    assert not set(BUFFERS) & set(load_file(quantized / "model.safetensors"))
    artifact = amx_tvm.compile(place, quantization="none", output=tmp_path / "out")
    got = np.asarray(amx_tvm.load(artifact.path).logits(ids))
    assert tiny.relative_error(got, expected) < 1e-4
    stored, rounded = weights_of(place), weights_of(quantized)
    assert sorted(stored) == sorted(rounded)
    assert "stored_biases" not in json.loads((quantized / "config.json").read_text())


@pytest.mark.parametrize(
    "missing, words",
    [
        ("lm_head.weight", ("lm_head.weight", "tie_word_embeddings")),
        ("model.layers.1.self_attn.o_proj.bias", ("o_proj.bias", "attention_bias")),
        ("model.layers.0.mlp.up_proj.weight", ("layers.0.mlp.up_proj.weight", "download")),
        ("model.layers.1.self_attn.o_proj.weight", ("2 layers", "o_proj.weight")),
    ],
)
def test_what_is_missing_is_named_with_the_way_out(saved, missing, words, tmp_path):
    tensors, config = saved("llama")
    del tensors[missing]
    message = refused(written(tmp_path / "a", tensors, {**config, "tie_word_embeddings": False}))
    for word in words:
        assert word in message


def test_foreign_prefixes_and_adapters_are_named(saved, tmp_path):
    tensors, config = saved("llama")
    wrapped = {f"module.{name}": values for name, values in tensors.items()}
    message = refused(written(tmp_path / "a", wrapped, config))
    assert "'module.model.layers.1.self_attn.o_proj.weight'" in message and "rename" in message
    adapter = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 2))}
    assert "LoRA" in refused(written(tmp_path / "b", adapter, config))


@pytest.mark.parametrize(
    "family, architectures",
    [
        ("llama", None),
        ("llama", []),
        ("llama", ["LlamaModel"]),
        ("llama", ["LLaMAForCausalLM"]),
        ("llama", ["PeftModelForCausalLM"]),
        ("mistral", ["FSDPMistralForCausalLM"]),
        ("gpt2", ["GPT2Model"]),
        ("gpt2", ["GPT2DoubleHeadsModel"]),
        ("gemma3", ["Gemma3TextModel"]),
        *((family, None) for family in FAMILIES),
    ],
)
def test_architectures_where_model_type_is_clear(saved, family, architectures, tmp_path):
    tensors, config = saved(family)
    config["architectures"] = architectures
    source = open_model(written(tmp_path / "a", tensors, config))
    assert identify(source)[0].name == family


@pytest.mark.parametrize(
    "architectures", [["LlamaForSequenceClassification"], ["MambaForCausalLM"]]
)
def test_architectures_of_something_else(saved, architectures, tmp_path):
    tensors, config = saved("llama")
    message = refused(written(tmp_path / "a", tensors, {**config, "architectures": architectures}))
    assert architectures[0] in message


def test_a_good_single_file_beside_a_stale_index(saved, tmp_path):
    tensors, config = saved("llama")
    place = written(tmp_path / "a", tensors, config)
    expected = weights_of(place)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    same(weights_of(place), expected)


def test_pickles_are_named(saved, tmp_path):
    place = written(tmp_path / "a", *saved("llama"))
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refused(place)


def retyped(path, name, dtype):
    """Give a tensor another type in the header of its file."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "I8"])
def test_types_are_refused_only_where_they_are_needed(saved, dtype, tmp_path):
    tensors, config = saved("llama")
    tensors["model.layers.9.mlp.extra.weight"] = np.zeros((4, 4), np.uint8)
    place = written(tmp_path / "a", tensors, config)
    expected = weights_of(place)
    retyped(place / "model.safetensors", "model.layers.9.mlp.extra.weight", dtype)
    same(weights_of(place), expected)
    tensors["model.norm.weight"] = np.zeros(64, np.uint8)
    place = written(tmp_path / "b", tensors, config)
    retyped(place / "model.safetensors", "model.norm.weight", dtype)
    message = refused(place)
    assert "'model.norm.weight'" in message and dtype in message


def test_float64_weights_are_read(saved, tmp_path):
    tensors, config = saved("llama")
    wide = {name: values.astype(np.float64) for name, values in tensors.items()}
    same(
        weights_of(written(tmp_path / "a", tensors, config)),
        weights_of(written(tmp_path / "b", wide, config)),
    )
