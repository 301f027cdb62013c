"""Gemma 4 beyond the family's case: other key heads, values of keys, shared layers of a batch."""

from __future__ import annotations

import numpy as np
import pytest
import transformers

import amx_tvm
from amx_tvm.errors import ModelError
from amx_tvm.models import find
from amx_tvm.runtime.session import decode_batch

from . import tiny

DENSE = {
    **tiny.GEMMA_4,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "num_key_value_heads": 4,
}
LENGTH, PREFILLED, FORKED = 40, 30, 20


# transformers 5.23 cannot run layers that share without inputs of their own.
FORMS = {
    "alone": {"num_kv_shared_layers": 0},
    "shared": {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
    "experts": {"num_kv_shared_layers": 0, "enable_moe_block": True, "num_experts": 8}
    | {"top_k_experts": 3, "moe_intermediate_size": 32},
}


@pytest.fixture(scope="module", params=sorted(FORMS))
def made(request, tmp_path_factory):
    """A model whose layers have keys alone or shared, or experts, and its engine."""
    place = tmp_path_factory.mktemp("gemma4")
    fields = FORMS[request.param]
    model = tiny.make("gemma4", seed=2, **{**DENSE, **fields})
    directory = tiny.save(model, place / "model")
    artifact = amx_tvm.compile(directory, quantization="none", output=place / "out")
    return model, amx_tvm.load(artifact.path, kv_tokens=1024)


def test_full_layers_have_heads_and_values_of_their_own(made):
    model, engine = made
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, LENGTH).tolist()
    assert tiny.relative_error(np.asarray(engine.logits(ids)), tiny.logits(model, ids)) < 1e-4


def test_batches_forks_and_rollbacks(made):
    model, engine = made
    random = np.random.default_rng(2)
    texts = [random.integers(3, tiny.VOCAB, LENGTH).tolist() for _ in range(3)]
    expected = [tiny.logits(model, ids) for ids in texts]
    sequences = [engine.sequence() for _ in texts]
    for sequence, ids in zip(sequences, texts, strict=True):
        sequence.append(ids[:PREFILLED])
    for place in range(PREFILLED, LENGTH):
        rows = decode_batch(sequences, [ids[place] for ids in texts])
        for row, wanted in zip(rows, expected, strict=True):
            assert tiny.relative_error(row, wanted[place]) < 1e-4
    child = sequences[0].fork(FORKED)
    sequences[0].rollback(LENGTH - FORKED)
    for sequence in (child, sequences[0]):
        row = sequence.append(texts[0][FORKED:])
        assert tiny.relative_error(row, expected[0][-1]) < 1e-4


def test_the_cache_has_the_layers_that_have_keys(made):
    model, engine = made
    cache = engine.manifest.kv_cache
    assert cache["layers"] == 6 - model.config.num_kv_shared_layers
    assert (cache["kv_heads"], cache["head_dim"]) == (4, 32)


def test_files_of_old_name_their_full_layers_size():
    """``per_layer_config`` is newer than ``global_head_dim``."""
    values = transformers.Gemma4TextConfig(**{**tiny.SHAPE, **DENSE}).to_dict()
    new = find(values).configure(values)
    del values["per_layer_config"]
    old = {**values, "global_head_dim": 32, "num_global_key_value_heads": 1}
    assert find(old).configure(old) == new


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({**FORMS["experts"], "top_k_experts": 9}, "'top_k_experts' is 9; expected 1"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"num_kv_shared_layers": 5}, "each kind needs a layer of its own"),
        ({"per_layer_config": {"1": {"num_key_value_heads": 3}}}, "no multiple"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "expected 'proportional'"),
    ],
)
def test_what_no_layer_does_is_refused(change, word):
    values = {**tiny.SHAPE, **tiny.GEMMA_4, "rms_norm_eps": 1e-6, "model_type": "gemma4_text"}
    with pytest.raises(ModelError, match=word):
        find(values | change).configure(values | change)


def test_keys_in_few_bits_are_refused_where_layers_share_them(tmp_path):
    directory = tiny.save(tiny.make("gemma4"), tmp_path / "model")
    with pytest.raises(ModelError, match="layers share keys and values"):
        amx_tvm.compile(directory, kv_cache="amxfp4", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
