"""Small good files of every kind that others write; the fuzzer damages them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INNER, VOCAB = 16, 32, 64
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": [2],
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 32},
    "tie_word_embeddings": False, "attention_bias": False, "layer_types": ["full_attention"],
    "sliding_window": None, "partial_rotary_factor": 1.0,
}  # fmt: skip
TEMPLATE = """\
{%- set ns = namespace(n=0) -%}
{%- for message in messages %}
{%- if message.role == 'user' and loop.index > 0 %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content | trim ~ eos_token }}
{%- set ns.n = ns.n + 1 %}
{%- else %}
{{- message | tojson(indent=2) }}
{%- endif %}
{%- endfor %}
{%- macro show(x) %}{{ x['content'].split('a')[0] }}{% endmacro %}
{{ show(messages[0]) }}{{ ns.n }}{{ tools | length if tools }}
"""
STABLEHLO = """\
module @m {
  func.func public @main(%arg0: tensor<2x4xf32>) -> tensor<2x3xf32> {
    %cst = stablehlo.constant dense<0.5> : tensor<4x3xf32>
    %0 = stablehlo.dot_general %arg0, %cst, contracting_dims = [1] x [0] : (tensor<2x4xf32>, tensor<4x3xf32>) -> tensor<2x3xf32>
    %1 = call @f(%0) : (tensor<2x3xf32>) -> tensor<2x3xf32>
    %2 = stablehlo.reshape %1 : (tensor<2x3xf32>) -> tensor<6xf32>
    %3 = stablehlo.reshape %2 : (tensor<6xf32>) -> tensor<2x3xf32>
    return %3 : tensor<2x3xf32>
  }
  func.func private @f(%arg0: tensor<2x3xf32>) -> tensor<2x3xf32> {
    %0 = stablehlo.tanh %arg0 : tensor<2x3xf32>
    return %0 : tensor<2x3xf32>
  }
}
"""  # noqa: E501


def weights(names: bool = True) -> dict[str, np.ndarray]:
    """Return the tensors of the tiny model."""
    random, made = np.random.default_rng(0), {}
    shapes = {"q": (HIDDEN, HIDDEN), "k": (8, HIDDEN), "v": (8, HIDDEN), "o": (HIDDEN, HIDDEN)}
    layer = "model.layers.0."
    for key, shape in shapes.items():
        made[f"{layer}self_attn.{key}_proj.weight"] = random.standard_normal(shape)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    for key, shape in shapes.items():
        made[f"{layer}mlp.{key}_proj.weight"] = random.standard_normal(shape)
    for key in ("input_layernorm", "post_attention_layernorm"):
        made[f"{layer}{key}.weight"] = np.ones(HIDDEN)
    made["model.norm.weight"] = np.ones(HIDDEN)
    for key in ("model.embed_tokens", "lm_head"):
        made[f"{key}.weight"] = random.standard_normal((VOCAB, HIDDEN))
    return {key: value.astype(np.float32) for key, value in made.items()}


def adapter() -> dict[str, np.ndarray]:
    """Return the tensors of a LoRA adapter for the tiny model."""
    random, made = np.random.default_rng(1), {}
    for module, out in (("self_attn.q_proj", HIDDEN), ("mlp.up_proj", INNER)):
        stem = f"base_model.model.model.layers.0.{module}.lora"
        made[f"{stem}_A.weight"] = random.standard_normal((4, HIDDEN))
        made[f"{stem}_B.weight"] = random.standard_normal((out, 4))
    return {key: value.astype(np.float32) for key, value in made.items()}


def safetensors_parts(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        place = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": place}
        data += array.tobytes()
    return header, data


def safetensors(header: bytes, data: bytes) -> bytes:
    """Return the file of a header and data."""
    return struct.pack("<Q", len(header)) + header + data


def tokenizer() -> dict[str, Any]:
    """Return a byte-level tokenizer.json with one of everything."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate([*characters, "ab"])}, [("a", "b")]))
    replace = normalizers.Replace("ä", "a")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), replace])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("</s>", normalized=False, special=True)])
    return json.loads(made.to_str())


def gguf_file(folder: Path) -> bytes:
    """Return a llama GGUF file."""
    import gguf

    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    path = folder / "good.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": HIDDEN}
    numbers |= {"feed_forward_length": INNER, "attention.head_count": 2}
    numbers |= {"attention.head_count_kv": 1, "attention.key_length": 8}
    for key, value in (numbers | {"rope.dimension_count": 8}).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(VOCAB - 3))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([2, 3, 3, *[1] * (VOCAB - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, array in weights().items():
        stem = name.removesuffix(".weight").removeprefix("model.layers.0.")
        kind = stem.rpartition(".")[2].removesuffix("_proj")
        plain = {
            "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
            "input_layernorm": "blk.0.attn_norm", "post_attention_layernorm": "blk.0.ffn_norm",
        }  # fmt: skip
        made = plain.get(kind) or f"blk.0.{names.get(kind) or f'ffn_{kind}'}"
        writer.add_tensor(f"{made}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


LINEAR = {
    "name": "lm_head",
    "spec": {"format": "none", "n": VOCAB, "k": HIDDEN},
    "kernel": "direct",
    "rows": {"1": "x"},
}


def artifact(folder: Path) -> dict[str, bytes]:
    """Return the files of an artifact whose library is none: it is checked and never loaded."""
    from amx_tvm.artifact import ArtifactWriter, Manifest, TargetRecord, Versions

    with ArtifactWriter(folder / "good") as writer:
        writer.path("lib.so").write_bytes(bytes(range(256)) * 8)
        for name, array in weights().items():
            writer.parameters.add(name, array)
        writer.path("tokenizer.json").write_text(json.dumps(tokenizer()))
        config = {"chat_template": TEMPLATE, "eos_token": "</s>"}
        writer.path("tokenizer_config.json").write_text(json.dumps(config))
        shape = {"layers": 1, "kv_heads": 1, "head_dim": 8}
        writer.finish(
            Manifest(
                versions=Versions("0", "0", "0"),
                target=TargetRecord("llvm", "llvm", ""),
                library=writer.library(),
                parameters=writer.parameters.finish(),
                model={"family": "llama", "name": "tiny", "config": CONFIG, "vocab_size": VOCAB}
                | {"context_length": 64, "eos_token_ids": [2], "prompt_prefix": [1]},
                kv_cache={"page_size": 16, "dtype": "float32", **shape},
                quantization={"format": "none", "bits_per_weight": 32.0},
                linears=[LINEAR],
                recipes={name: {"sources": [name]} for name in weights()},
            )
        )
    files = [path for path in (folder / "good").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder / "good")): path.read_bytes() for path in files}


def onnx_file() -> bytes:
    """Return a model of a product and an activation."""
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((8, 4), np.float32), "w")
    shape = numpy_helper.from_array(np.array([4, 2], np.int64), "s")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Reshape", ["b", "s"], ["y"]),
    ]
    x, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, dims)
        for n, dims in (("x", [2, 8]), ("y", [4, 2]))
    )
    graph = helper.make_graph(nodes, "g", [x], [y], [weight, shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()
