"""GGUF files: block types against ggml's C code, the real SmolLM2, and damaged files."""

from __future__ import annotations

import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as GgmlType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amx_tvm.errors import ModelError
from amx_tvm.frontends import open_model
from amx_tvm.frontends.gguf.file import MAX_ENTRIES, MAX_TEXTS, GgufFile
from amx_tvm.frontends.gguf.types import SUPPORTED, dequantize, quantized_blocks

from .conftest import DATA, one_line

# Stored blocks (ggml_quantize_chunk) and their values (to_float), from ggml's C code, 2 x 256.
BLOCKS = np.load(DATA / "ggml_blocks.npz")


def write_gguf(path, tensors, keys=None, architecture="llama", skip=(), alignment=None, split=None):
    """Write a tiny GGUF file; ``keys`` overrides or adds keys without the architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    if split:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", split[2])
    if alignment:
        writer.add_custom_alignment(alignment)
    values = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **(keys or {}),
    }
    for key, value in values.items():
        if key in skip:
            continue
        name = f"{architecture}.{key}"
        if isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_uint32(name, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_tensors():
    """Return a few tensors of one block, by name: values and stored type."""
    rng = np.random.default_rng(3)
    floats = rng.standard_normal((64, 64)).astype(np.float32)
    return {
        "token_embd.weight": (floats, None),
        "output_norm.weight": (floats[0].copy(), None),
        "blk.0.attn_q.weight": (floats * 2, None),
        "blk.0.attn_k.weight": (gguf.quantize(floats, GgmlType.Q8_0), GgmlType.Q8_0),
        "blk.0.attn_v.weight": (gguf.quantize(floats, GgmlType.MXFP4), GgmlType.MXFP4),
    }


@pytest.fixture
def tiny():
    return tiny_tensors()


def fails(path, *parts):
    with pytest.raises(ModelError) as caught:
        open_model(path)
    message = one_line(caught.value)
    for part in parts:
        assert part in message


GOLDEN = {kind for kind in SUPPORTED if f"{kind.name}_stored" in BLOCKS}


@pytest.mark.parametrize("kind", sorted(GOLDEN, key=lambda kind: kind.name))
def test_block_types_equal_ggml(kind):
    stored, values = BLOCKS[f"{kind.name}_stored"], BLOCKS[f"{kind.name}_values"]
    result = dequantize(stored, kind, (2, 256))
    assert result.dtype == np.float32
    # K-quants multiply in another order than the C code: the last bit may differ.
    np.testing.assert_allclose(result, values, rtol=3e-7, atol=1e-9)
    np.testing.assert_array_equal(result, gguf.dequantize(stored, kind))


def test_all_types_that_the_gguf_package_decodes_are_read():
    plain = {GgmlType.F32, GgmlType.F16}
    assert plain | set(gguf.quants._type_traits) == SUPPORTED


@pytest.mark.parametrize("kind", sorted(SUPPORTED - GOLDEN, key=lambda kind: kind.name))
def test_other_block_types_equal_the_gguf_package(kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(5).integers(0, 256, (300, 1024 // block * size), dtype=np.uint8)
    rows &= 0x77  # no scale is NaN
    result = dequantize(rows, kind, (300, 1024))
    np.testing.assert_array_equal(result, gguf.dequantize(rows, kind))


@pytest.mark.parametrize("kind", [GgmlType.MXFP4, GgmlType.Q8_0])
def test_formats_pass_through_without_rounding(kind):
    stored, values = BLOCKS[f"{kind.name}_stored"], BLOCKS[f"{kind.name}_values"]
    raw = quantized_blocks(stored, kind, (2, 256))
    assert raw.codes.shape == (2, 256) and raw.scales["scale"].shape == (2, 8)
    np.testing.assert_array_equal(raw.format.dequantize(raw), values)


def nvfp4_blocks(rows, columns):
    """Random NVFP4 blocks: any codes under any scales but the reserved one."""
    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 256, (rows, columns // 64, 36), dtype=np.uint8)
    blocks[..., :4] &= 0x77
    return blocks.reshape(rows, -1)


def test_nvfp4_passes_through_without_rounding(tiny, tmp_path):
    stored = nvfp4_blocks(64, 64)
    raw = quantized_blocks(stored, GgmlType.NVFP4, (64, 64))
    values = gguf.dequantize(stored, GgmlType.NVFP4)
    np.testing.assert_array_equal(raw.format.dequantize(raw), values)
    np.testing.assert_array_equal(dequantize(stored, GgmlType.NVFP4, (64, 64)), values)
    # In a model the factor on the whole tensor is a tensor of its own.
    tiny["blk.0.attn_v.weight"] = (stored, GgmlType.NVFP4)
    tiny["blk.0.attn_v.scale"] = (np.array([0.25], np.float32), None)
    source = open_model(write_gguf(tmp_path / "model.gguf", tiny))
    name = "model.layers.0.self_attn.v_proj.weight"
    assert name.replace("weight", "scale") not in source.names()
    raw = source.load_raw(name)
    assert raw.format.name == "nvfp4" and float(raw.tensor_scale) == 0.25
    np.testing.assert_array_equal(source.load(name), values * np.float32(0.25))
    np.testing.assert_array_equal(raw.format.dequantize(raw), source.load(name))


def test_other_blocks_do_not_pass_through():
    assert quantized_blocks(BLOCKS["Q4_K_stored"], GgmlType.Q4_K, (2, 256)) is None


def test_smollm2_configuration(smollm2):
    config = smollm2.config
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert {key: config[key] for key in expected} == expected
    assert smollm2.generation_config == {
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "pad_token_id": 2,
        "prompt_prefix": [],
    }
    assert len(smollm2.names()) == 272 and smollm2.nbytes == 96_576_768
    assert smollm2.dtype("model.layers.0.mlp.up_proj.weight") == "q4_1"


def test_container_equals_the_gguf_packages_reader(smollm2):
    reader = gguf.GGUFReader(smollm2.path)
    file = GgufFile(smollm2.path)
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = file.tensors[tensor.name]
        assert ours.type == tensor.tensor_type and ours.offset == tensor.data_offset
        assert ours.nbytes == tensor.n_bytes and list(ours.shape) == tensor.shape.tolist()[::-1]
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            expected, given = field.contents(), file.metadata[key]
            if isinstance(given, float):
                assert np.float32(given) == np.float32(expected)
            else:
                assert (given.tolist() if isinstance(given, np.ndarray) else given) == expected


@pytest.mark.slow
def test_smollm2_equals_transformers_gguf_loading(smollm2):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # Not from_pretrained, which wants one more package; the model here only gives the names.
    config = load_gguf_checkpoint(str(smollm2.path))["config"]
    for key in ("rope_theta", "rms_norm_eps", "head_dim", "num_key_value_heads", "vocab_size"):
        assert np.float32(config[key]) == np.float32(smollm2.config[key]), key
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    theirs = load_gguf_checkpoint(str(smollm2.path), True, model_to_load=model)["tensors"]
    assert set(smollm2.names()) == set(theirs)
    for name, values in smollm2:
        np.testing.assert_array_equal(values, theirs[name].numpy(), err_msg=name)


def test_smollm2_embedding_passes_through(smollm2):
    name = "model.embed_tokens.weight"
    raw = smollm2.load_raw(name)
    assert raw.format.name == "int8"
    np.testing.assert_array_equal(raw.format.dequantize(raw), smollm2.load(name))
    assert smollm2.load_raw("model.layers.0.mlp.up_proj.weight") is None


STREAM = """
import sys
from amx_tvm.frontends import open_model

def most():  # not ru_maxrss, which counts the process that started this one
    with open("/proc/self/status") as status:
        return int(status.read().split("VmHWM:")[1].split()[0]) * 1024

source = open_model(sys.argv[1])
before = most()
largest = total = 0
for name, values in source:
    largest, total = max(largest, values.nbytes), total + values.nbytes
print(most() - before, largest, total, "torch" in sys.modules, "tvm" in sys.modules)
"""


def test_streaming_holds_one_tensor_at_a_time(smollm2):
    run = [sys.executable, "-c", STREAM, str(smollm2.path)]
    output = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    grown, largest, total = (int(number) for number in output[:3])
    assert total == 134_515_008 * 4  # every parameter, as float32
    assert grown < largest + 64 * 2**20, "the largest tensor, its stored bytes, one step's work"
    assert output[3:] == ["False", "False"]


def test_raw_rows_follow_the_loaded_rows(tmp_path, tiny):
    source = open_model(write_gguf(tmp_path / "tiny.gguf", tiny))
    for name, kind in (("k_proj", "int8"), ("v_proj", "mxfp4")):
        name = f"model.layers.0.self_attn.{name}.weight"
        raw = source.load_raw(name)
        assert raw.format.name == kind
        np.testing.assert_array_equal(raw.format.dequantize(raw), source.load(name))


def test_stored_scale_that_is_nan_is_refused(tmp_path, tiny):
    tiny["blk.0.attn_v.weight"][0].reshape(-1, 17)[5, 0] = 255  # E8M0 NaN
    source = open_model(write_gguf(tmp_path / "tiny.gguf", tiny))
    with pytest.raises(ModelError, match="v_proj.weight.*NaN"):
        source.load_raw("model.layers.0.self_attn.v_proj.weight")


def test_alignment_of_the_file_is_used(tmp_path, tiny):
    plain = open_model(write_gguf(tmp_path / "a.gguf", tiny))
    wide = open_model(write_gguf(tmp_path / "b.gguf", tiny, alignment=256))
    assert wide.metadata["general.alignment"] == 256
    for name in plain.names():
        np.testing.assert_array_equal(plain.load(name), wide.load(name))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.floats(0, 1, exclude_max=True))
def test_truncated_file_at_any_byte(tmp_path, tiny, kept):
    path = write_gguf(tmp_path / "tiny.gguf", tiny)
    file = GgufFile(path)
    end = max(tensor.offset + tensor.nbytes for tensor in file.tensors.values())
    path.write_bytes(path.read_bytes()[: int(kept * end)])
    fails(path)


def test_truncated_smollm2_says_so(tmp_path, smollm2):
    whole = smollm2.path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (len(whole) - 1, len(whole) // 2, 1_000_000, 100):
        cut.write_bytes(whole[:size])
        fails(cut, "truncated", str(cut))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 900), value=st.integers(0, 255))
def test_damaged_header_never_crashes(tmp_path, tiny, position, value):
    path = write_gguf(tmp_path / "tiny.gguf", tiny)
    content = bytearray(path.read_bytes())
    content[position] = value
    path.write_bytes(content)
    try:
        source = open_model(path)
    except ModelError as error:
        one_line(error)
    else:
        for _ in source:
            pass


@pytest.mark.parametrize("what", ["keys", "tensors", "texts"])
def test_more_entries_than_memory(tmp_path, what):
    """Each takes hundreds of bytes of Python's, and a header of 96 MiB has millions."""
    tensors, keys = (MAX_ENTRIES + 1 if what == name else 1 for name in ("tensors", "keys"))
    path = tmp_path / "m.gguf"
    entry = struct.pack("<Q1sIIQ", 1, b"a", 9, 8, MAX_TEXTS + 1)  # a list of empty strings
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys) + entry + bytes(64))
    most = MAX_TEXTS if what == "texts" else MAX_ENTRIES
    fails(path, f"at most {most} are read", str(most + 1))


def test_tensor_without_values_is_refused(tmp_path, tiny):
    tiny["output_norm.weight"] = (np.zeros(0, np.float32), None)
    fails(write_gguf(tmp_path / "tiny.gguf", tiny), "output_norm.weight", "[0]")


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_missing_key_is_named(tmp_path, tiny, key):
    path = write_gguf(tmp_path / "tiny.gguf", tiny, skip=(key,))
    fails(path, f"'llama.{key}'")


def test_head_count_of_zero_is_refused(tmp_path, tiny):
    path = write_gguf(tmp_path / "tiny.gguf", tiny, {"attention.head_count": 0})
    fails(path, "attention.head_count", "positive")


def test_head_counts_per_layer_are_refused(tmp_path, tiny):
    path = write_gguf(tmp_path / "tiny.gguf", tiny, {"attention.head_count": [4, 2]})
    fails(path, "attention.head_count", "one number")


def test_equal_head_counts_per_layer_are_one_number(tmp_path, tiny):
    keys = {"attention.head_count": [4], "feed_forward_length": [96, 96]}
    config = open_model(write_gguf(tmp_path / "tiny.gguf", tiny, keys)).config
    assert config["num_attention_heads"] == 4 and config["intermediate_size"] == 96


def test_unknown_architecture_names_the_nearest(tmp_path, tiny):
    path = write_gguf(tmp_path / "tiny.gguf", tiny, architecture="qwen4")
    fails(path, "'qwen4'", "nearest supported one is 'qwen", "llama")


def test_tensor_that_no_llama_has(tmp_path, tiny):
    path = write_gguf(
        tmp_path / "a.gguf", {**tiny, "blk.0.ssm_in.weight": tiny["output_norm.weight"]}
    )
    fails(path, "blk.0.ssm_in.weight")
    tiny["blk.0.ffn_gate_exps.weight"] = tiny["token_embd.weight"]
    path = write_gguf(tmp_path / "b.gguf", tiny)
    fails(path, "layers.0.mlp.experts.gate_proj.weight", "'llama.expert_count'")


def test_type_that_is_not_read_is_refused_where_it_is_needed(tmp_path, tiny):
    tiny["output.weight"] = (np.zeros((4, 64), np.int32), None)
    source = open_model(write_gguf(tmp_path / "tiny.gguf", tiny))
    with pytest.raises(ModelError) as caught:
        source.check("lm_head.weight")
    message = one_line(caught.value)
    assert "lm_head.weight" in message and "I32" in message and "Q4_K" in message


def test_rows_that_do_not_divide_into_heads(tmp_path, tiny):
    path = write_gguf(tmp_path / "tiny.gguf", tiny, {"attention.head_count": 5})
    fails(path, "q_proj", "5 heads")


def test_file_of_another_kind(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGML" + bytes(100))
    fails(tmp_path / "a.gguf", "not a GGUF file")
    (tmp_path / "b.gguf").write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(100))
    fails(tmp_path / "b.gguf", "little endian")
