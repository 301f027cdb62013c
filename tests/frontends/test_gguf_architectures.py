"""Every GGUF architecture against the Hugging Face directory of the same tiny model.

The model is written to GGUF as llama.cpp's converter does (tensor names from the gguf package's own
map, rows of q and k interleaved, 1 added to Gemma's norms, GPT-2's linears transposed, experts
stacked) and read back: the compiler gets the same shape of the decoder and the same weights.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from amx_tvm.frontends import open_model
from amx_tvm.frontends.checkpoint import identify, open_weights
from amx_tvm.frontends.gguf.architectures import ARCHITECTURES
from amx_tvm.models import moe, rope

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

BLOCKS = 7  # Gemma 3 has a layer with global attention only from 6 on
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
UNTIED = {"attention_bias": False}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 8,
}
LONGROPE_KEYS = {
    "rope.scaling.original_context_length": 64,
    "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(256 / 64) / np.log(64))),
}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 32.0,
    "rope.scaling.original_context_length": 8,
}
WINDOW = {"attention.sliding_window": 16}
WIDE = {"attention.key_length": 32, "attention.value_length": 32}
# case -> (GGUF architecture, model_type, more configuration, more keys in the file)
MODELS = {
    "llama": ("llama", "llama", UNTIED, {"vocab_size": 96}),
    "llama with biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "mistral": ("llama", "mistral", {"sliding_window": 16, "head_dim": 16}, WINDOW),
    "mixtral": (
        "llama",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "mistral3": ("mistral3", "mistral", {"sliding_window": None, "head_dim": 16}, {}),
    "qwen2": ("qwen2", "qwen2", {}, {}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32}, WIDE),
    "qwen3moe": (
        "qwen3moe",
        "qwen3_moe",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        {**WIDE, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "gemma2": (
        "gemma2",
        "gemma2",
        {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | {"tie_word_embeddings": True},
        {**WIDE, **WINDOW, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}
        | {"tie_word_embeddings": True},
        {**WIDE, **WINDOW},
    ),
    "phi3": ("phi3", "phi3", {"sliding_window": None}, {}),
    "phi3 with a window": ("phi3", "phi3", {"sliding_window": 16}, WINDOW),
    "phi3 long": (
        "phi3",
        "phi3",
        {"sliding_window": None, "rope_parameters": LONGROPE}
        | {"original_max_position_embeddings": 64},
        LONGROPE_KEYS,
    ),
    "smollm3": ("smollm3", "smollm3", {"tie_word_embeddings": True}, {}),
    "olmo2": ("olmo2", "olmo2", {}, {}),
    "olmo3": (
        "olmo2",
        "olmo3",
        {"sliding_window": 16},
        {**WINDOW, "attention.sliding_window_pattern": 4},
    ),
    "granite": (
        "granite",
        "granite",
        {"attention_multiplier": 0.25, "embedding_multiplier": 4.0, "residual_multiplier": 0.5}
        | {"logits_scaling": 8.0},
        {"attention.scale": 0.25, "embedding_scale": 4.0, "residual_scale": 0.5}
        | {"logit_scale": 8.0},
    ),
    "exaone4": (
        "exaone4",
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * BLOCKS},
        {},
    ),
    "exaone4 with a window": (
        "exaone4",
        "exaone4",
        {"sliding_window": 16},
        {**WINDOW, "attention.sliding_window_pattern": 4},
    ),
    "cohere": ("command-r", "cohere", {**TIED, "logit_scale": 0.5}, {"logit_scale": 0.5}),
    "cohere2": (
        "cohere2",
        "cohere2",
        {**TIED, "logit_scale": 0.5, "sliding_window": 16},
        {**WINDOW, "logit_scale": 0.5},
    ),
    "seed_oss": ("seed_oss", "seed_oss", {"head_dim": 16}, {}),
    "stablelm": ("stablelm", "stablelm", {"use_qkv_bias": True}, {"rope.dimension_count": 4}),
    "stablelm in parallel": (
        "stablelm",
        "stablelm",
        {"use_parallel_residual": True},
        {"rope.dimension_count": 4, "use_parallel_residual": True},
    ),
    "ernie4_5": ("ernie4_5", "ernie4_5", {**TIED, "head_dim": 32}, WIDE),
    "glm4": ("glm4", "glm4", {"head_dim": 32}, {**WIDE, "rope.dimension_count": 16}),
    "gemma": ("gemma", "gemma", {**TIED, "head_dim": 32}, WIDE),
    "olmoe": (
        "olmoe",
        "olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "gpt2": ("gpt2", "gpt2", {"tie_word_embeddings": True}, {}),
    "gpt-oss": (
        "gpt-oss",
        "gpt_oss",
        {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
        | {"rope_parameters": YARN},
        {**WIDE, **WINDOW, **YARN_KEYS, "expert_count": 4, "expert_used_count": 2}
        | {"expert_feed_forward_length": 96, "attention.sliding_window_pattern": 2},
    ),
}
INTERLEAVED = ("granite", "llama", "mistral3", "smollm3")


def interleave(weight, heads):
    """Permute rows as convert_hf_to_gguf.py does for llama."""
    rows = weight.shape[0]
    grouped = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(grouped.swapaxes(1, 2)).reshape(weight.shape)


def converted(architecture, model):
    """Yield (GGUF name, values) of a model as the converter writes them."""
    config = model.config
    kinds = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], BLOCKS)
    heads = {"q_proj": config.num_attention_heads}
    heads["k_proj"] = getattr(config, "num_key_value_heads", config.num_attention_heads)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy().copy()
        part = name.split(".")[-2]
        if architecture in INTERLEAVED and part in heads:
            values = interleave(values, heads[part])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if architecture == "gpt2" and part in ("c_attn", "c_proj", "c_fc") and values.ndim == 2:
            values = values.T
        if ".experts." in name:
            yield from experts(architecture, name, values)
            continue
        if name.endswith(".sinks"):
            yield f"blk.{name.split('.')[2]}.attn_sinks.weight", values
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None and name.endswith(("router.weight", "router.bias", "gate.weight")):
            stored = f"blk.{name.split('.')[2]}.ffn_gate_inp.{name.rpartition('.')[2]}"
        assert stored, name
        yield stored, values


def experts(architecture, name, values):
    """Yield the stacks of gate, up and down, [experts, N, K], of what transformers has in one."""
    block, part = name.split(".")[2], name.rpartition(".")[2]
    kind = "bias" if part.endswith("_bias") else "weight"
    if architecture == "gpt-oss" and kind == "weight":
        values = values.swapaxes(1, 2)
    if part.startswith("down_proj"):
        yield f"blk.{block}.ffn_down_exps.{kind}", values
        return
    half = values.shape[1] // 2
    gate, up = (
        (values[:, 0::2], values[:, 1::2])
        if architecture == "gpt-oss"
        else (values[:, :half], values[:, half:])
    )
    yield f"blk.{block}.ffn_gate_exps.{kind}", gate
    yield f"blk.{block}.ffn_up_exps.{kind}", up


def write(path, architecture, model, keys, tables=None, change=lambda name, values: values):
    config = model.config
    parameters = getattr(config, "rope_parameters", None) or {}
    theta = parameters.get("full_attention", parameters).get("rope_theta")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if architecture != "gpt-oss":
        writer.add_feed_forward_length(getattr(config, "intermediate_size", 256))
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(theta)
        if hasattr(config, "layer_norm_eps"):
            writer.add_layer_norm_eps(config.layer_norm_eps)
        else:
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[bool] = writer.add_bool
        add[type(value)](f"{architecture}.{key}", value)
    for name, values in converted(architecture, model):
        changed = change(name, values)
        for stored, array in [(name, values)] if changed is values else changed:
            writer.add_tensor(stored, np.ascontiguousarray(array))
    for name, table in (tables or {}).items():
        writer.add_tensor(f"{name}.weight", np.asarray(table, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_model(model_type, more):
    torch.manual_seed(0)
    sizes = dict(SIZES)
    if model_type == "gpt2":
        sizes = {k: v for k, v in sizes.items() if k not in ("intermediate_size", "pad_token_id")}
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1 or name.endswith("_bias"):
                tensor.add_(torch.randn_like(tensor) * 0.3)  # zeros and ones would hide mistakes
            elif not tensor.abs().sum() > 0 or ".experts." in name:
                tensor.copy_(torch.randn_like(tensor))
    return model


def read(source):
    """Return the decoder's shape and all weights as the compiler reads them."""
    source = open_model(source)
    family, decoder = identify(source)
    network = family.build(decoder)
    shapes = {n: tuple(int(v) for v in p.shape) for n, p in network.named_parameters()}
    named = open_weights(source, family, decoder, moe.unstacked(shapes, decoder)[0])
    return decoder, {name: named.load(name) for name in named.names()}


def same(path, model):
    decoder, weights = read(path)
    expected, values = read(model)
    ropes = [
        [rope.rotation(config, layer) for layer in range(BLOCKS)] for config in (decoder, expected)
    ]
    for one, other in zip(*ropes, strict=True):
        np.testing.assert_allclose(one.frequencies, other.frequencies, rtol=1e-6)
        assert one.factor == pytest.approx(other.factor)
    plain = {"rope_scaling": {}, "layer_ropes": (), "norm_eps": 0.0, "rope_theta": 0.0}
    assert replace(decoder, **plain) == replace(expected, **plain)
    assert decoder.norm_eps == pytest.approx(expected.norm_eps)
    assert sorted(weights) == sorted(values)
    for name, array in values.items():
        # Gemma's norms lose their last bits to the 1 that the converter adds.
        np.testing.assert_allclose(weights[name], array, atol=3e-7, rtol=0, err_msg=name)


def test_every_entry_has_a_model_here():
    assert {case[0] for case in MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("case", sorted(MODELS))
def test_a_file_is_read_as_its_directory(tmp_path, case):
    architecture, model_type, more, keys = MODELS[case]
    model = random_model(model_type, more)
    tables = None
    if "long" in case:
        tables = {f"rope_factors_{n}": LONGROPE[f"{n}_factor"] for n in ("long", "short")}
    same(write(tmp_path / "tiny.gguf", architecture, model, keys, tables), model)


def test_one_tensor_an_expert_as_old_files_have_it(tmp_path):
    architecture, model_type, more, keys = MODELS["mixtral"]
    model = random_model(model_type, more)

    def apart(name, values):
        if "_exps." not in name:
            return values
        stem = name.replace("_exps.weight", "")
        return [(f"{stem}.{expert}.weight", values[expert]) for expert in range(len(values))]

    same(write(tmp_path / "tiny.gguf", architecture, model, keys, change=apart), model)


def test_phi3_with_q_k_and_v_apart(tmp_path):
    model = random_model("phi3", {"sliding_window": None})

    def apart(name, values):
        if "attn_qkv" not in name:
            return values
        parts = np.split(values, [64, 96])
        return [(name.replace("qkv", kind), part) for kind, part in zip("qkv", parts, strict=True)]

    same(write(tmp_path / "tiny.gguf", "phi3", model, {}, change=apart), model)


@pytest.mark.parametrize("kept", ["qkv", "q", "kv", "o", "qkvo"])
def test_optional_biases_one_by_one(tmp_path, kept):
    model = random_model("llama", {"attention_bias": True})
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("_proj.bias") and name.split(".")[-2][0] not in kept:
                tensor.zero_()

    def some(name, values):
        part = name.split(".")[-2].removeprefix("attn_")[0]
        return [] if name.endswith(".bias") and part not in kept else values

    path = write(tmp_path / "tiny.gguf", "llama", model, {}, change=some)
    _, weights = read(path)
    for name, values in read(model)[1].items():
        if name in weights:
            np.testing.assert_array_equal(weights[name], values, err_msg=name)
        else:
            assert name.endswith(".bias") and not values.any()
