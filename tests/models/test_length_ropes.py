"""Rotary embeddings that depend on the length: longrope a sequence, YaRN's context, dynamic NTK."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers

import amx_tvm
from amx_tvm.frontends.hf.config import normalize
from amx_tvm.models import find, rope
from amx_tvm.models.config import Rope
from amx_tvm.runtime.session import decode_batch

from . import tiny
from .test_unsupported import BASE

TRAINED, HALF = 40, 8
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * HALF,
    "long_factor": [4.0 + i for i in range(HALF)],
    "original_max_position_embeddings": TRAINED,
}


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """A tiny Phi-3 with longrope: transformers' model and a loaded engine of it."""
    place = tmp_path_factory.mktemp("longrope")
    config = transformers.Phi3Config(
        **{**tiny.SHAPE, "sliding_window": None, "rope_parameters": LONGROPE},
        original_max_position_embeddings=TRAINED,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 2:
                value.copy_(torch.randn_like(value) * 1.5 * value.shape[-1] ** -0.5)
    artifact = amx_tvm.compile(
        tiny.save(model, place / "model"), quantization="none", output=place / "out"
    )
    return model, amx_tvm.load(artifact.path, threads=1, max_sequences=4)


def ids_of(count, seed=1):
    return np.random.default_rng(seed).integers(3, tiny.VOCAB, count).tolist()


def close(got, expected):
    assert tiny.relative_error(np.asarray(got), expected) < 1e-4


@pytest.mark.parametrize("count", [1, TRAINED - 1, TRAINED, TRAINED + 1, 100])
def test_a_prompt_takes_the_table_of_its_length(longrope, count):
    model, engine = longrope
    close(engine.logits(ids_of(count)), tiny.logits(model, ids_of(count)))


def test_a_sequence_that_grows_past_the_trained_length(longrope):
    """Every step is what transformers computes for the whole sequence; so is what follows."""
    model, engine = longrope
    ids = ids_of(TRAINED + 4)
    with engine.sequence() as sequence:
        sequence.append(ids[: TRAINED - 2])
        for count in range(TRAINED - 1, len(ids) + 1):
            close(sequence.append([ids[count - 1]]), tiny.logits(model, ids[:count])[-1])
        child = sequence.fork(10)
        sequence.rollback(6)
        close(sequence.append([7]), tiny.logits(model, [*ids[: TRAINED - 2], 7])[-1])
        close(child.append([5, 6]), tiny.logits(model, [*ids[:10], 5, 6])[-1])
        child.close()


def test_short_and_long_sequences_in_one_step(longrope):
    model, engine = longrope
    short, long = ids_of(20), ids_of(60, seed=2)
    with engine.sequence() as one, engine.sequence() as two:
        one.append(short)
        two.append(long[:30])
        two.append(long[30:])
        got = decode_batch([one, two], [4, 5])
    close(got[0], tiny.logits(model, [*short, 4])[-1])
    close(got[1], tiny.logits(model, [*long, 5])[-1])


def test_text_is_transformers_own(longrope):
    model, engine = longrope
    ids = ids_of(TRAINED - 4, seed=3)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=10, do_sample=False, eos_token_id=None
        )[0, len(ids) :].tolist()
    assert list(engine.generate(ids, max_new_tokens=10, ignore_eos=True).token_ids)[:10] == expected


def configured(architecture="LlamaForCausalLM", **fields):
    values = {**BASE, "architectures": [architecture], **fields}
    return find(values).configure(values)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize(
    "longest, original, context", [(128, 128, 512), (128, None, 512), (512, 128, 512)]
)
def test_yarn_extends_the_context(architecture, key, longest, original, context):
    scaling = {key: "yarn", "factor": 4.0, "original_max_position_embeddings": original}
    config = configured(architecture, max_position_embeddings=longest, rope_scaling=scaling)
    assert config.context_length == context
    expected = (
        rope.frequencies(Rope(10000.0, {**scaling, "original_max_position_embeddings": 128}), 16)
        if original or longest == 128
        else None
    )
    assert rope.rotation(config, 0) == expected


def test_families_with_ropes_of_their_own_extend_alike():
    """Gemma 3's dictionary for each kind of layer, without the trained length."""
    far = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    near = {"rope_type": "default", "rope_theta": 1e4}
    values = {**BASE, "architectures": ["Gemma3ForCausalLM"], "head_dim": 16, "sliding_window": 8}
    values["rope_parameters"] = {"full_attention": far, "sliding_attention": near}
    config = find(values).configure(normalize(values))
    trained = BASE["max_position_embeddings"]
    assert config.context_length == 4 * trained
    scaling = {**far, "original_max_position_embeddings": trained}
    layers = [rope.rotation(config, layer) for layer in range(2)]
    assert rope.frequencies(Rope(1e4, {}), 16) in layers
    kinds = find(values).configure(normalize({**values, "layer_types": ["full_attention"] * 2}))
    assert rope.rotation(kinds, 0) == rope.frequencies(Rope(1e6, scaling), 16)


def test_dynamic_scaling_is_plain_up_to_the_trained_length():
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    config = configured(rope_scaling=scaling)
    assert config.context_length == BASE["max_position_embeddings"]
    values = transformers.LlamaConfig(
        **{**tiny.SHAPE, "rope_parameters": {**scaling, "rope_theta": 10000.0}}
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](values, "cpu", seq_len=128)
    np.testing.assert_allclose(rope.rotation(config, 0).frequencies, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "kind, read", [("su", "longrope"), ("longrope", "longrope"), ("yarn", "yarn")]
)
def test_old_spellings_of_phi3(kind, read):
    scaling = {k: v for k, v in LONGROPE.items() if k != "rope_type"} | {"type": kind, "factor": 2}
    scaling.pop("original_max_position_embeddings")
    config = configured(
        "Phi3ForCausalLM", rope_scaling=scaling, original_max_position_embeddings=TRAINED
    )
    assert config.rope_scaling["rope_type"] == read
    assert config.long_after == (TRAINED if read == "longrope" else 0)


def test_for_gpus_the_context_ends_where_the_short_table_does(longrope):
    from amx_tvm.compiler.lowered import longrope as described
    from amx_tvm.targets import resolve

    fields = {"rope_scaling": LONGROPE, "original_max_position_embeddings": TRAINED}
    config = configured("Phi3ForCausalLM", **fields)
    assert described(config, resolve("cuda:sm_90a")) == {"context_length": TRAINED}
    assert longrope[1].manifest.model["long_after"] == TRAINED
    assert longrope[1].manifest.model["context_length"] == tiny.SHAPE["max_position_embeddings"]


def test_scheduled_requests_of_both_lengths(longrope):
    model, engine = longrope
    prompts = [ids_of(12, seed=4), ids_of(TRAINED - 3, seed=5), ids_of(60, seed=6)]
    results = engine.generate_batch(prompts, max_new_tokens=6, ignore_eos=True)
    for prompt, result in zip(prompts, results, strict=True):
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
            )
        assert result.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 3.0, "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 9.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"partial_rotary_factor": 0.75, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ],
    ids=str,
)
def test_fields_inside_and_beside_mean_what_they_mean_to_transformers(fields):
    family = "Llama" if "linear" in str(fields) else "Phi3"  # the one has scalings, the other parts
    values = {**BASE, "architectures": [f"{family}ForCausalLM"], **fields}
    ours = find(values).configure(normalize(values))
    kind = getattr(transformers, f"{family}Config")
    theirs = kind(**{**BASE, **copy.deepcopy(fields)}).rope_parameters
    assert ours.rope_theta == theirs["rope_theta"]
    assert ours.rope_scaling.get("rope_type", "default") == theirs["rope_type"]
    assert ours.rope_scaling.get("factor") == theirs.get("factor")
    rotated = ours.head_dim if ours.rotary_dim is None else ours.rotary_dim
    assert rotated == int(ours.head_dim * theirs.get("partial_rotary_factor", 1.0))
