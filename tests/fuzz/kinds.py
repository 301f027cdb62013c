"""What is fuzzed: for each kind of file of others ways to damage a good one, and its reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from . import good, readers
from . import mutations as damage

TEMPLATE_WORDS = (
    "{{", "}}", "{%", "%}", "* 10**9", "range(10**8)", "|tojson", "|indent(9**9)", "loop", "none",
    "messages", "show(messages[0])", "'a' * 10**9", "|attr('__class__')", "~ ns.n", "|list", "ns.s",
    "{% for x in range(99999) %}", "{% endfor %}", "raise_exception(1)", "|map", "[ns, ns]", "1/0",
    "|join", ".format", "'%9999999d' % 1", "(", ")", "{% break %}", "|center(9**9)",
)  # fmt: skip
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


def kinds(folder: Path) -> dict[str, Kind]:
    """Return all kinds; ``folder`` is for making the good inputs."""
    from tuning.records import SHIPPED

    header, data = good.safetensors_parts(good.weights())
    whole = good.safetensors(damage.text_of(header), data)
    start = 8 + len(damage.text_of(header))
    artifact = good.artifact(folder)
    manifest = json.loads(artifact["manifest.json"])
    tiny, model, made = good.gguf_file(folder), good.onnx_file(), good.tokenizer()
    records = sorted(SHIPPED.glob("*.jsonl"))[0].read_bytes().split(b"\n")[:3]
    entries = [json.loads(line) for line in records if line]
    lines = st.one_of(
        damage.damaged_bytes(b"\n".join(records) + b"\n"),
        damage.damaged_json(entries).map(lambda v: b"\n".join(map(damage.text_of, v or [0]))),
    )
    files = [name for name in artifact if name != "manifest.json"]
    tokens = {"eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True}
    tokens |= {"added_tokens_decoder": {"257": {"content": "</s>", "special": True}}}
    tokens |= {"chat_template": [{"name": "default", "template": "x"}], "extra_special_tokens": []}
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False}
    adapter |= {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"0\.mlp\..*": 2.0}}
    lora, lora_data = good.safetensors_parts(good.adapter())
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}

    def directory(name: str, value: Any) -> st.SearchStrategy[dict[str, bytes]]:
        return damage.damaged_json(value).map(lambda v: {name: damage.text_of(v)})

    return {
        "artifact": Kind(
            st.one_of(
                st.tuples(st.just("forged"), damage.damaged_json(manifest)),
                st.tuples(
                    st.just("manifest.json"), damage.damaged_bytes(artifact["manifest.json"])
                ),
                *(st.tuples(st.just(n), damage.damaged_bytes(artifact[n])) for n in files),
            ),
            readers.read_artifact(artifact),
        ),
        "gguf": Kind(damage.damaged_bytes(tiny, 0, len(tiny) // 2), readers.read_gguf),
        "safetensors": Kind(
            st.one_of(
                damage.damaged_bytes(whole, 0, start + 8),
                damage.damaged_json(header).map(
                    lambda v: good.safetensors(damage.text_of(v), data)
                ),
            ),
            readers.read_safetensors,
        ),
        "config": Kind(
            st.one_of(
                directory("config.json", good.CONFIG),
                directory("generation_config.json", generation),
            ),
            readers.read_directory,
        ),
        "tokenizer": Kind(
            st.one_of(
                directory("tokenizer.json", made), directory("tokenizer_config.json", tokens)
            ),
            readers.read_directory,
        ),
        "adapter": Kind(
            st.one_of(
                directory("adapter_config.json", adapter),
                damage.damaged_json(lora).map(
                    lambda v: {
                        "adapter_config.json": damage.text_of(adapter),
                        "adapter_model.safetensors": good.safetensors(damage.text_of(v), lora_data),
                    }
                ),
            ),
            readers.read_adapter,
        ),
        "template": Kind(
            damage.damaged_text(good.TEMPLATE, TEMPLATE_WORDS), readers.read_template, False
        ),
        "onnx": Kind(damage.damaged_bytes(model), readers.read_onnx),
        "stablehlo": Kind(
            damage.damaged_text(good.STABLEHLO, STABLEHLO_WORDS), readers.read_stablehlo
        ),
        "records": Kind(lines, readers.read_records),
        "journal": Kind(lines, readers.read_journal),
    }
