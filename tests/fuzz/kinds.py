"""What is fuzzed: for every kind of file of others a small good one, ways to damage it, its reader.

A kind is (strategy of inputs, reader). A reader gets an empty folder and one input, and returns or
raises an AmxError; `limited.WrongError` is for what it should not have taken.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from . import mutations as damage
from .limited import WrongError

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
TEMPLATE_WORDS = (
    "{{", "}}", "{%", "%}", "* 10**9", "range(10**8)", "|tojson", "|indent(9**9)", "loop", "none",
    "messages", "show(messages[0])", "'a' * 10**9", "|attr('__class__')", "~ ns.n", "|list", "ns.s",
    "{% for x in range(99999) %}", "{% endfor %}", "raise_exception(1)", "|map", "[ns, ns]", "1/0",
    "|join", ".format", "'%9999999d' % 1", "(", ")", "{% break %}", "|center(9**9)",
)  # fmt: skip
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
STABLEHLO_WORDS = (
    "tensor<", ">", "(", "[", "99999x99999xf32", "call @main", "call @f(%0)", "dense<1.0>", "x?x",
    "i1", "bf16", "complex<f32>", "stablehlo.iota dim = 0", "-1", "dense_resource<a>", "{", "}",
    "func.func", "stablehlo.while", "18446744073709551616", "0x", "loc(\"a\")", "#a", "%0", "%arg0",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of input: its strategy and its reader."""

    inputs: st.SearchStrategy[Any]
    read: Callable[[Path, Any], None]
    own_process: bool = True  # templates have one anyway


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


def _read_safetensors(folder: Path, content: bytes) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from amx_tvm.frontends.hf.safetensors_file import ITEM_BYTES, LOADABLE, SafetensorsFile

    path = folder / "m.safetensors"
    path.write_bytes(content)
    file = SafetensorsFile(path)
    for name, entry in file.tensors.items():
        if entry.dtype in LOADABLE:
            file.load(name)
    if all(entry.dtype in ITEM_BYTES for entry in file.tensors.values()):
        try:
            load(content)
        except SafetensorError as error:
            raise WrongError(f"the reference refuses it: {error}") from None
        except (TypeError, KeyError):
            pass  # a type that NumPy lacks


def _identify(source: Any) -> None:
    from amx_tvm.frontends.checkpoint import identify
    from amx_tvm.models.rope import rotation

    _, decoder = identify(source)
    for layer in range(min(decoder.num_layers, 4)):
        rotation(decoder, layer)


def _read_directory(folder: Path, files: dict[str, bytes]) -> None:
    from amx_tvm.frontends import open_model

    header, data = safetensors_parts(weights())
    good = {
        "config.json": damage.text_of(CONFIG),
        "model.safetensors": safetensors(damage.text_of(header), data),
        "tokenizer.json": damage.text_of(tokenizer()),
        "tokenizer_config.json": b'{"eos_token": "</s>"}',
    }
    for name, content in {**good, **files}.items():
        (folder / name).write_bytes(content)
    source = open_model(folder)
    _identify(source)
    _ = source.generation_config
    source.write_tokenizer(folder / "out")


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


def _read_gguf(folder: Path, content: bytes) -> None:
    from amx_tvm.frontends.gguf.source import GgufSource

    path = folder / "m.gguf"
    path.write_bytes(content)
    source = GgufSource(path)
    _identify(source)
    source.write_tokenizer(folder)
    for name in source.names()[:3]:
        source.check(name)
        source.load(name)


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
                linears=[{"name": "lm_head", "shape": [VOCAB, HIDDEN], "rows": {"1": "x"}}],
                recipes={name: {"sources": [name]} for name in weights()},
            )
        )
    files = [path for path in (folder / "good").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder / "good")): path.read_bytes() for path in files}


def _read_artifact(good: dict[str, bytes]) -> Callable[[Path, Any], None]:
    def read(folder: Path, case: tuple[str, Any]) -> None:
        from amx_tvm.artifact import Manifest, verify_artifact
        from amx_tvm.artifact.manifest import _digest
        from amx_tvm.cli.inspect_command import _facts, rows
        from amx_tvm.exporting.artifact_source import ArtifactSource

        name, changed = case
        for path, content in good.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        if name == "forged":  # by somebody who knows the digest
            data = changed if isinstance(changed, dict) else {"": changed}
            data["digest"] = _digest(data)
            changed, name = damage.text_of(data), "manifest.json"
        (folder / name).write_bytes(changed)
        verify_artifact(folder, "quick")
        manifest = Manifest.load(folder)
        if case[0] not in ("forged", "manifest.json") and changed != good[name]:
            raise WrongError(f"{name} was changed and verification passed")
        list(_facts(folder, manifest))
        rows(manifest.linears, True)
        ArtifactSource(folder)

    return read


def _read_template(folder: Path, source: str) -> None:
    from amx_tvm.runtime.chat import ChatTemplate

    messages = [{"role": "system", "content": "a b"}, {"role": "user", "content": "hé"}]
    ChatTemplate(source, {"eos_token": "</s>"}).render(messages, tools=None)


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


def _read_onnx(folder: Path, content: bytes) -> None:
    from amx_tvm.frontends.importers.onnx_file import from_onnx_file

    (folder / "m.onnx").write_bytes(content)
    from_onnx_file(folder / "m.onnx")


def _read_stablehlo(folder: Path, text: str) -> None:
    from amx_tvm.frontends.importers.stablehlo import from_stablehlo

    from_stablehlo(text.encode("utf-8", "surrogatepass"))


def _read_records(folder: Path, lines: bytes) -> None:
    from tuning.records import RecordFile, refusal

    (folder / "records.jsonl").write_bytes(lines)
    file = RecordFile(folder / "records.jsonl")
    for record in file.records:
        refusal(record, record.target)
    file.best()
    list(map(str, file.damage))


def _read_journal(folder: Path, lines: bytes) -> None:
    from tuning import journal

    (folder / "journal.jsonl").write_bytes(lines)
    entries, damaged = journal.read(folder / "journal.jsonl")
    journal.append(folder / "journal.jsonl", {"kind": "end"})
    again, _ = journal.read(folder / "journal.jsonl")
    if len(again) != len(entries) + 1 or again[:-1] != entries:
        raise WrongError("a line was lost or changed by an append")
    list(map(str, damaged))


def kinds(folder: Path) -> dict[str, Kind]:
    """Return all kinds; ``folder`` is for making the good inputs."""
    from tuning.records import SHIPPED

    header, data = safetensors_parts(weights())
    whole = safetensors(damage.text_of(header), data)
    start = 8 + len(damage.text_of(header))
    good = artifact(folder)
    manifest = json.loads(good["manifest.json"])
    tiny, model, made = gguf_file(folder), onnx_file(), tokenizer()
    records = sorted(SHIPPED.glob("*.jsonl"))[0].read_bytes().split(b"\n")[:3]
    entries = [json.loads(line) for line in records if line]
    lines = st.one_of(
        damage.damaged_bytes(b"\n".join(records) + b"\n"),
        damage.damaged_json(entries).map(lambda v: b"\n".join(map(damage.text_of, v or [0]))),
    )
    files = [name for name in good if name != "manifest.json"]
    tokens = {"eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True}
    tokens |= {"added_tokens_decoder": {"257": {"content": "</s>", "special": True}}}
    tokens |= {"chat_template": [{"name": "default", "template": "x"}], "extra_special_tokens": []}
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}

    def directory(name: str, value: Any) -> st.SearchStrategy[dict[str, bytes]]:
        return damage.damaged_json(value).map(lambda v: {name: damage.text_of(v)})

    return {
        "artifact": Kind(
            st.one_of(
                st.tuples(st.just("forged"), damage.damaged_json(manifest)),
                st.tuples(st.just("manifest.json"), damage.damaged_bytes(good["manifest.json"])),
                *(st.tuples(st.just(n), damage.damaged_bytes(good[n])) for n in files),
            ),
            _read_artifact(good),
        ),
        "gguf": Kind(damage.damaged_bytes(tiny, 0, len(tiny) // 2), _read_gguf),
        "safetensors": Kind(
            st.one_of(
                damage.damaged_bytes(whole, 0, start + 8),
                damage.damaged_json(header).map(lambda v: safetensors(damage.text_of(v), data)),
            ),
            _read_safetensors,
        ),
        "config": Kind(
            st.one_of(
                directory("config.json", CONFIG), directory("generation_config.json", generation)
            ),
            _read_directory,
        ),
        "tokenizer": Kind(
            st.one_of(
                directory("tokenizer.json", made), directory("tokenizer_config.json", tokens)
            ),
            _read_directory,
        ),
        "template": Kind(damage.damaged_text(TEMPLATE, TEMPLATE_WORDS), _read_template, False),
        "onnx": Kind(damage.damaged_bytes(model), _read_onnx),
        "stablehlo": Kind(damage.damaged_text(STABLEHLO, STABLEHLO_WORDS), _read_stablehlo),
        "records": Kind(lines, _read_records),
        "journal": Kind(lines, _read_journal),
    }
