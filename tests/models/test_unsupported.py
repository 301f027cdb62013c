"""What families cannot do fails before any work, with the field's or the architecture's name."""

from __future__ import annotations

import pytest
import transformers

from amx_tvm.errors import ModelError
from amx_tvm.frontends.fields import Configuration
from amx_tvm.models import families, find
from amx_tvm.models.config import STORED_BIASES
from amx_tvm.models.config_reader import ConfigReader

from . import tiny

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize(
    "architecture, change, words",
    [
        ("LlamaForCausalLM", {"hidden_act": "relu2"}, ("hidden_act", "relu2", "silu")),
        ("LlamaForCausalLM", {"rms_norm_eps": None}, ("rms_norm_eps",)),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "odd"}}, ("rope_scaling", "odd")),
        (
            "Qwen3ForCausalLM",
            {"use_sliding_window": True, "layer_types": ["x", "y"]},
            ("layer_types",),
        ),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, ("no_rope_layers",)),
        (
            "GraniteMoeHybridForCausalLM",
            {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
            ("kind mamba", "granite-4.0-350m"),
        ),
        (
            "DeepseekV3ForCausalLM",
            {"n_routed_experts": 8, "num_experts_per_tok": 5, "moe_intermediate_size": 32}
            | {"n_group": 4, "topk_group": 2},
            ("n_group 4", "topk_group 2", "8 experts", "takes 5"),
        ),
        ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, ("scoring_func", "sigmoid")),
        (
            "GraniteMoeHybridForCausalLM",
            {"layer_types": ["attention"], "shared_intermediate_size": 64},
            ("layer_types", "1 entries for 2 layers"),
        ),
        (
            "DeepseekV3ForCausalLM",
            {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
            | {"mlp_layer_types": ["dense", "sprase"]},
            ("mlp_layer_types", "sprase", "'dense' or 'sparse' for each of 2 layers"),
        ),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, ("bidirectional",)),
    ],
)
def test_options(architecture, change, words):
    config = {**BASE, "architectures": [architecture], **change}
    with pytest.raises(ModelError) as raised:
        find(config).configure(config)
    for word in words:
        assert word in str(raised.value)


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(
        ModelError, match="'Qwen4ForCausalLM'.*nearest supported.*Qwen[23]ForCausalLM"
    ):
        find({"architectures": ["Qwen4ForCausalLM"]})


def test_unknown_architecture_names_what_is_missing():
    config = {"architectures": ["Qwen3NextForCausalLM"], "linear_num_value_heads": 32}
    with pytest.raises(ModelError, match="no family here has its .*linear attention"):
        find({**config, "shared_expert_intermediate_size": 512})


def test_full_windows_are_no_windows():
    family = find({"architectures": ["MistralForCausalLM"]})
    config = family.configure({**BASE, "sliding_window": 128})
    assert not config.layer_kinds and family in families()
    assert family.configure({**BASE, "sliding_window": 64}).slides(1)


@pytest.mark.parametrize("name", [*tiny.CASES, *tiny.VARIANTS])
def test_every_field_that_a_family_reads_has_a_type_and_bounds(name, monkeypatch):
    read = set()
    for method in ("get", "require"):
        real = getattr(ConfigReader, method)

        def noted(self, field, *rest, real=real):
            read.add(field)
            return real(self, field, *rest)

        monkeypatch.setattr(ConfigReader, method, noted)
    class_name, fields = {**tiny.CASES, **tiny.VARIANTS}[name]
    shape = {} if name == "gpt2" else tiny.SHAPE
    values = getattr(transformers, class_name)(**{**shape, **fields}).to_dict()
    find(values).configure(values)
    assert "vocab_size" in read
    assert read - {STORED_BIASES} <= set(Configuration.__annotations__)
