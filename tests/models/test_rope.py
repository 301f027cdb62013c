"""Rotary frequencies against transformers."""

import numpy as np
import pytest

from amx_tvm.errors import ModelError
from amx_tvm.models.config import Rope
from amx_tvm.models.rope import frequencies

LONG = [1.0 + 0.05 * i for i in range(32)]
SHORT = [1.0 + 0.01 * i for i in range(32)]
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
    "longrope": {
        "rope_type": "longrope",
        "long_factor": LONG,
        "short_factor": SHORT,
        "original_max_position_embeddings": 4096,
    },
}


def of(scaling, **more):
    """Frequencies of 64 channels and the factor."""
    found = frequencies(Rope(500000.0, scaling or {}), 64, **more)
    return np.array(found.frequencies), found.factor


@pytest.mark.parametrize("name", SCALINGS)
def test_same_as_transformers(name):
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    scaling = SCALINGS[name]
    if scaling is None:
        base = np.power(500000.0, np.arange(0, 64, 2, dtype=np.float64) / 64)
        expected, factor = 1 / base, 1.0
    else:
        parameters = dict(scaling, rope_theta=500000.0)
        hf = transformers.LlamaConfig(
            hidden_size=256,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=131072,
            rope_theta=500000.0,
            rope_scaling=parameters,
        )
        kind = scaling["rope_type"]
        extra = {"seq_len": 131072} if kind == "longrope" else {}
        expected, factor = utils.ROPE_INIT_FUNCTIONS[kind](hf, "cpu", **extra)
        expected = expected.numpy()
    ours, our_factor = of(scaling, trained=131072, context=131072)
    np.testing.assert_allclose(ours, expected, rtol=3e-7)
    assert our_factor == pytest.approx(factor, rel=1e-6)


def test_longrope_within_the_trained_length_takes_the_short_factors():
    long, _ = of(SCALINGS["longrope"], trained=131072, context=131072)
    short, _ = of(SCALINGS["longrope"], trained=131072, context=4096)
    ratio = short / long
    np.testing.assert_allclose(ratio, np.array(LONG) / np.array(SHORT), rtol=1e-6)


def test_legacy_type_field():
    new, _ = of({"rope_type": "linear", "factor": 2.0})
    old, _ = of({"type": "linear", "factor": 2.0})
    assert (new == old).all()


def test_dynamic_is_plain_up_to_the_trained_length_and_refused_beyond():
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    plain, _ = of(None)
    within, _ = of(scaling, trained=2048, context=2048)
    assert (within == plain).all()
    with pytest.raises(ModelError, match="2048"):
        of(scaling, trained=2048, context=4096)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "mrope"}, "mrope.*expected default"),
        ({"rope_type": "linear"}, "lacks the field 'factor'"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        (dict(SCALINGS["longrope"], long_factor=[1.0]), "1 values, expected 32"),
    ],
)
def test_bad_scalings_are_named(scaling, message):
    length = None if scaling.get("rope_type") == "yarn" else 131072
    with pytest.raises(ModelError, match=message):
        of(scaling, trained=length)
