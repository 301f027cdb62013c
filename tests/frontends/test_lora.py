"""LoRA adapters as PEFT writes them, merged into a checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers

from amx_tvm.errors import ModelError
from amx_tvm.frontends import open_model
from amx_tvm.frontends.lora import MergedLora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
GIVEN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE)
    place = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    words = {f"w{index}": index for index in range(SHAPE["vocab_size"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.save(str(place / "tokenizer.json"))
    return place


def pair(rank, out, inner, seed=1):
    random = np.random.default_rng(seed)
    return [
        random.standard_normal(size).astype(np.float32) for size in ((rank, inner), (out, rank))
    ]


def write(place, modules, embedding=(), prefix="base_model.model.", **fields):
    place.mkdir()
    tensors = {}
    for module, (a, b) in modules.items():
        kind = "lora_embedding_{}" if module in embedding else "lora_{}.weight"
        for letter, values in (("A", a), ("B", b)):
            tensors[f"{prefix}{module}.{kind.format(letter)}"] = values
    safetensors.save_file(tensors, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({**GIVEN, **fields}))
    return place


def test_merged_weights_and_the_others(base, tmp_path):
    a, b = pair(4, 32, 32)
    plain = open_model(base)
    merged = MergedLora(plain, write(tmp_path / "a", {Q: (a, b)}))
    for name in plain.names():
        change = 1.5 * b @ a if name == f"{Q}.weight" else 0
        np.testing.assert_allclose(merged.load(name), plain.load(name) + change, atol=1e-5)
        assert merged.shape(name) == plain.shape(name)
    assert merged.dtype(f"{Q}.weight") == "f32"
    assert merged.digest() != plain.digest()


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 1.5),
        ({"use_rslora": True}, 3.0),
        ({"alpha_pattern": {"down_proj": 2}}, 0.5),
        ({"r": 16, "rank_pattern": {r"layers\.1\.mlp\.down_proj": 4}}, 1.5),
        ({"alpha_pattern": {"own_proj": 2}}, 1.5),  # a part of a name is another module
    ],
)
def test_scales(base, fields, scale, tmp_path):
    a, b = pair(4, 32, 48)
    plain = open_model(base)
    merged = MergedLora(plain, write(tmp_path / "a", {DOWN: (a, b)}, **fields))
    name = f"{DOWN}.weight"
    np.testing.assert_allclose(merged.load(name), plain.load(name) + scale * (b @ a), atol=2e-5)


def test_embeddings_lie_the_other_way_round(base, tmp_path):
    module, (a, b) = "model.embed_tokens", pair(4, 32, 64)
    plain = open_model(base)
    merged = MergedLora(plain, write(tmp_path / "a", {module: (a, b)}, embedding={module}))
    name = f"{module}.weight"
    np.testing.assert_allclose(merged.load(name), plain.load(name) + 1.5 * (b @ a).T, atol=2e-5)


def test_linears_of_gpt2_lie_the_other_way_round(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    module, (a, b) = "transformer.h.0.attn.c_attn", pair(4, 96, 32)
    plain = open_model(tmp_path / "base")
    merged = MergedLora(plain, write(tmp_path / "a", {module: (a, b)}, fan_in_fan_out=True))
    name = f"{module}.weight"
    np.testing.assert_allclose(merged.load(name), plain.load(name) + 1.5 * (b @ a).T, atol=2e-5)


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_head.base_layer.weight"])
def test_weights_that_were_saved_whole_replace_the_base(base, name, tmp_path):
    place = write(tmp_path / "a", {Q: pair(4, 32, 32)}, modules_to_save=["lm_head"])
    file = place / "adapter_model.safetensors"
    whole = np.full((64, 32), 0.5, np.float32)
    safetensors.save_file({**safetensors.load_file(file), f"base_model.model.{name}": whole}, file)
    merged = MergedLora(open_model(base), place)
    np.testing.assert_array_equal(merged.load("lm_head.weight"), whole)
    np.testing.assert_array_equal(merged.load_entry("lm_head.weight", 3), whole[3])
    assert merged.load_raw_entry("lm_head.weight", 3) is None


def test_adapters_of_the_base_model_alone(base, tmp_path):
    a, b = pair(4, 32, 32)
    merged = MergedLora(open_model(base), write(tmp_path / "a", {Q.removeprefix("model."): (a, b)}))
    assert merged.dtype(f"{Q}.weight") == "f32"


def test_compiled_logits_equal_those_of_merged_weights(base, tmp_path):
    import amx_tvm

    down, q = pair(4, 32, 48, 2), pair(4, 32, 32, 3)
    adapter = write(tmp_path / "a", {DOWN: down, Q: q})
    made = amx_tvm.compile(base, adapter=adapter, quantization="none", output=tmp_path / "out")
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for module, (a, b) in ((DOWN, down), (Q, q)):
            model.get_parameter(f"{module}.weight").add_(torch.from_numpy(1.5 * b @ a))
        expected = model(torch.tensor([[5, 6, 7, 8]])).logits[0].numpy()
    got = amx_tvm.load(made.path).logits([5, 6, 7, 8])
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    assert made.manifest.model["name"].endswith("-a")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "r is 0"),
        ({"r": 8}, "r = 8"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"rank_pattern": {"(": 4}}, "regular expression"),
        ({"rank_pattern": {"(a*)*b": 4}}, "repetitions"),
        ({"alpha_pattern": {"a*a*a*a*b": 4}}, "repetitions"),
    ],
)
def test_what_is_more_than_lora_is_refused(base, fields, word, tmp_path):
    place = write(tmp_path / "a", {Q: pair(4, 32, 32)}, **fields)
    with pytest.raises(ModelError, match=word):
        MergedLora(open_model(base), place)


@pytest.mark.parametrize(
    ("modules", "word"),
    [
        ({"model.layers.9.self_attn.q_proj": pair(4, 32, 32)}, "no such weight"),
        ({Q: pair(4, 40, 32)}, r"\[40, 32\]"),
        ({f"{Q}.extra.lora_B": pair(4, 32, 32)}, "no such weight"),
    ],
)
def test_another_base_is_refused(base, modules, word, tmp_path):
    with pytest.raises(ModelError, match=word):
        MergedLora(open_model(base), write(tmp_path / "a", modules))


def test_what_is_no_adapter_is_refused(base, tmp_path):
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        MergedLora(open_model(base), base)
    with pytest.raises(ModelError, match="--adapter"):
        open_model(write(tmp_path / "a", {Q: pair(4, 32, 32)}))
    half = write(tmp_path / "half", {Q: pair(4, 32, 32)})
    a = {f"base_model.model.{Q}.lora_A.weight": pair(4, 32, 32)[0]}
    safetensors.save_file(a, half / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="only lora_A"):
        MergedLora(open_model(base), half)
    other = write(tmp_path / "other", {Q: pair(4, 32, 32)})
    bias = {"base_model.model.lm_head.bias": np.zeros(64, np.float32)}
    safetensors.save_file(bias, other / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="no part of a LoRA adapter"):
        MergedLora(open_model(base), other)
