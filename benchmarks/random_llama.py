"""A Llama-3.2-1B-shaped model with random weights, for speed only: HF directory and GGUF files.

    python benchmarks/random_llama.py DIR

Every tensor repeats one pool of normal numbers, so the files hold the same weights and are written
in seconds: blocks of 32 quantize alike wherever they lie. Query and key rows are not permuted for
GGUF and the tokenizer knows one letter: what is compared is time, not text. About 4 GB on disk.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
POOL = 1 << 24  # numbers; a multiple of every row length
GGUF_KINDS = ("q4_0", "mxfp4")


def tensors(shape: dict = SHAPE) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (Hugging Face name, GGUF name, shape) of every tensor."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    yield "model.embed_tokens.weight", "token_embd.weight", (shape["vocab_size"], hidden)
    yield "model.norm.weight", "output_norm.weight", (hidden,)
    for i in range(shape["num_hidden_layers"]):
        for theirs, ours, size in (
            ("input_layernorm", "attn_norm", (hidden,)),
            ("self_attn.q_proj", "attn_q", (queries, hidden)),
            ("self_attn.k_proj", "attn_k", (keys, hidden)),
            ("self_attn.v_proj", "attn_v", (keys, hidden)),
            ("self_attn.o_proj", "attn_output", (hidden, queries)),
            ("post_attention_layernorm", "ffn_norm", (hidden,)),
            ("mlp.gate_proj", "ffn_gate", (inner, hidden)),
            ("mlp.up_proj", "ffn_up", (inner, hidden)),
            ("mlp.down_proj", "ffn_down", (hidden, inner)),
        ):
            yield f"model.layers.{i}.{theirs}.weight", f"blk.{i}.{ours}.weight", size


def pool(count: int = POOL) -> np.ndarray:
    """Return the numbers that all weights repeat, float32 [count], exact in bfloat16."""
    values = 0.02 * np.random.default_rng(0).standard_normal(count, np.float32)
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def write_huggingface(directory: Path, numbers: np.ndarray, shape: dict = SHAPE) -> Path:
    """Write config.json and one bfloat16 safetensors file; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape, indent=1))
    empty = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None}
    empty |= {"post_processor": None, "decoder": None, "truncation": None, "padding": None}
    empty["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    (directory / "tokenizer.json").write_text(json.dumps(empty))
    weights = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    header, offset = {}, 0
    for name, _, size in tensors(shape):
        end = offset + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, _, size in tensors(shape):
            if len(size) == 1:
                file.write(np.full(size, 0x3F80, np.uint16))  # norms: 1.0
                continue
            for start in range(0, math.prod(size), weights.size):
                file.write(weights[: math.prod(size) - start])
    return directory


def write_gguf(path: Path, kind: str, numbers: np.ndarray, shape: dict = SHAPE) -> Path:
    """Write a GGUF file with every matrix (head and embedding too) as ``kind``; return its path."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    type_ = GGMLQuantizationType[kind.upper()]
    packed = quants.quantize(numbers.reshape(-1, 32), type_)  # uint8 [blocks, bytes of a block]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for _, name, size in tensors(shape):
        if len(size) == 1:
            writer.add_tensor(name, np.ones(size, np.float32))
            continue
        blocks = math.prod(size) // 32
        data = np.resize(packed, (blocks, packed.shape[1])).reshape(size[0], -1)
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(directory: Path, shape: dict = SHAPE, count: int = POOL) -> dict[str, Path]:
    """Make what is missing below ``directory``; return {"hf", "q4_0", "mxfp4": path}."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {"hf": directory / "hf"} | {k: directory / f"{k}.gguf" for k in GGUF_KINDS}
    numbers = None
    for kind, path in paths.items():
        if path.exists():
            continue
        numbers = pool(count) if numbers is None else numbers
        scratch = path.with_name(path.name + ".part")
        if kind == "hf":
            write_huggingface(scratch, numbers, shape)
        else:
            write_gguf(scratch, kind, numbers, shape)
        scratch.rename(path)
    return paths


if __name__ == "__main__":
    for made in make(Path(sys.argv[1])).values():
        print(made)
