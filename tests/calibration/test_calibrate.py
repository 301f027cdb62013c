"""calibrate() on a tiny random Llama: exactness of transforms, gain of recipes, stored form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from amx_tvm import formats
from amx_tvm.calibration import (
    RECIPES,
    Gptq,
    MixedPrecision,
    Plain,
    Recipe,
    RotateValues,
    Smooth,
    calibrate,
)
from amx_tvm.calibration.recipes import get as get_recipe
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import CalibrationError, FormatError, ModelError

from .tiny import TinySource, calibrated_arrays, transformers_logits

FOUR_BIT = [n for n in formats.names() if formats.get(n).code_bits == 4]


@pytest.fixture(scope="module")
def source() -> TinySource:
    return TinySource()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (6, 48), generator=torch.Generator().manual_seed(0))


def kl(source, arrays, ids) -> float:
    exact = torch.log_softmax(transformers_logits(source, source.arrays, ids), -1)
    other = torch.log_softmax(transformers_logits(source, arrays, ids), -1)
    return float((exact.exp() * (exact - other)).sum(-1).mean())


@pytest.mark.parametrize("name", FOUR_BIT)
def test_plain_recipe_is_the_formats_own_rounding(source, ids, name):
    result = calibrate(source, name, ids, "plain")
    assert len(result.quantized) == 14 and len(result.floats) == 0
    for weight in result.quantized:
        want = formats.get(name).quantize(source.arrays[weight])
        got = result.quantized[weight]
        np.testing.assert_array_equal(got.codes, want.codes)
        for scale in want.scales:
            np.testing.assert_array_equal(got.scales[scale], want.scales[scale])
            assert got.scales[scale].dtype == want.scales[scale].dtype
        assert (got.tensor_scale is None) == (want.tensor_scale is None)


def test_transforms_leave_the_network_as_it_is(source, ids):
    recipe = Recipe("exact", (RotateValues(), Smooth(), Plain()))
    config = QuantizationConfig(format="amxfp4", overrides={"*": "none"})
    result = calibrate(source, config, ids, recipe)
    assert len(result.quantized) == 0 and len(result.floats) > 14
    exact = transformers_logits(source, source.arrays, ids)
    got = transformers_logits(source, calibrated_arrays(source, result), ids)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
    changed = result.floats["model.layers.0.self_attn.v_proj.weight"]
    assert np.abs(changed - source.arrays["model.layers.0.self_attn.v_proj.weight"]).max() > 0.1


@pytest.mark.parametrize("name", ["amxfp4", "amxfp4-e4m3-tensor", "nvfp4", "mxfp4", "int4"])
def test_gptq_and_search_beat_plain_rounding(source, ids, name):
    test = torch.randint(0, 64, (6, 48), generator=torch.Generator().manual_seed(1))
    scores = {}
    for recipe in ("plain", "search", "gptq"):
        result = calibrate(source, name, ids, recipe)
        scores[recipe] = kl(source, calibrated_arrays(source, result), test)
    assert scores["gptq"] < 0.85 * scores["plain"]
    assert scores["search"] < 1.02 * scores["plain"]


def test_joint_search_lowers_the_error_it_minimizes(source, ids):
    errors = {}
    for search in ("none", "diagonal", "joint"):
        recipe = Recipe(search, (Gptq(search=search),))
        result = calibrate(source, "amxfp4", ids, recipe)
        errors[search] = sum(result.errors.values())
    assert errors["joint"] < errors["diagonal"] < errors["none"]


def test_w4a4_statistics_see_quantized_activations(source, ids):
    weight_only = calibrate(source, "amxfp4", ids, "gptq")
    both = calibrate(source, "amxfp4-w4a4", ids, "gptq")
    name = "model.layers.1.mlp.down_proj.weight"
    assert (weight_only.quantized[name].codes != both.quantized[name].codes).mean() > 0.02


def test_mixed_precision_stays_within_its_budget(source, ids):
    recipe = Recipe("mixed", (MixedPrecision(bits=5.5), Plain()))
    result = calibrate(source, "amxfp4", ids, recipe)
    bits = total = 0.0
    for weight in result.quantized:
        quantized = result.quantized[weight]
        bits += quantized.codes.size * quantized.format.bits_per_value
        total += quantized.codes.size
        linear = weight.removesuffix(".weight")
        assert quantized.format.name == result.config.linear(linear).format
    assert 4.5 < bits / total <= 5.5
    shared = [result.config.linear(f"model.layers.0.self_attn.{p}_proj").format for p in "qkv"]
    assert len(set(shared)) == 1


def test_a_weight_that_is_stored_in_the_format_passes_through(ids):
    source = TinySource()
    name = "model.layers.0.mlp.up_proj.weight"
    raw = formats.get("mxfp4").quantize(source.arrays[name])
    source.raw[name] = raw
    source.arrays[name] = raw.format.dequantize(raw)
    recipe = Recipe("all", (RotateValues(), Smooth(), Gptq()))
    result = calibrate(source, "mxfp4", ids, recipe)
    assert name not in result.quantized and name not in result.floats
    assert "model.layers.0.mlp.gate_proj.weight" in result.quantized


def test_ignored_linears_and_overrides(source, ids):
    config = QuantizationConfig(
        format="amxfp4", ignored=("model.layers.0.*",), overrides={"*.down_proj": "int8"}
    )
    result = calibrate(source, config, ids, "gptq")
    assert not any(".layers.0." in name for name in result.quantized)
    assert result.quantized["model.layers.1.mlp.down_proj.weight"].format.name == "int8"
    assert result.quantized["model.layers.1.mlp.up_proj.weight"].format.name == "amxfp4"


def test_results_in_a_directory_of_the_users(source, ids, tmp_path):
    result = calibrate(source, "nvfp4", ids, "plain", directory=tmp_path / "new")
    assert len(list((tmp_path / "new").iterdir())) == len(result.quantized) == 14
    assert "nothing" not in result.quantized
    with pytest.raises(KeyError):
        result.quantized["nothing"]
    with pytest.raises(CalibrationError, match="not empty"):
        calibrate(source, "nvfp4", ids, "plain", directory=tmp_path / "new")


def test_documents_are_tokenized_by_the_models_tokenizer(source):
    text = ["abc defg " * 40, "0123 4567 " * 40]
    recipe = Recipe("few", (Plain(),), windows=4, window=32)
    result = calibrate(source, "amxfp4", text, recipe)
    assert len(result.errors) == 14 and all(0 < e < 0.05 for e in result.errors.values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("amxfp4", ["too short"], "gptq"), CalibrationError, "needs 12288"),
        (("amxfp4", torch.full((2, 8), 64), "gptq"), CalibrationError, "vocabulary has 64"),
        (("amxfp4", torch.zeros(8, dtype=torch.long), "gptq"), CalibrationError, "shape"),
        (("amxfp4", torch.zeros(2, 8, dtype=torch.long), "finest"), CalibrationError, "known are"),
        (("none", torch.zeros(2, 8, dtype=torch.long), "gptq"), CalibrationError, "nothing"),
        (("fp3", torch.zeros(2, 8, dtype=torch.long), "gptq"), FormatError, "fp3"),
    ],
)
def test_bad_input(source, arguments, error, message):
    with pytest.raises(error, match=message):
        calibrate(source, *arguments)


def test_unsupported_models(ids):
    with pytest.raises(ModelError):
        calibrate(TinySource(architectures=["Unheard"], model_type="unheard"), "amxfp4", ids)
    with pytest.raises(CalibrationError, match="norms"):
        olmo = TinySource(architectures=["Olmo2ForCausalLM"], model_type="olmo2")
        calibrate(olmo, "amxfp4", ids)
    incomplete = TinySource()
    del incomplete.arrays["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CalibrationError, match="dense"):
        calibrate(incomplete, "amxfp4", ids)
    sliding = TinySource(
        architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=32
    )
    with pytest.raises(CalibrationError, match="sliding window of 32"):
        calibrate(sliding, "amxfp4", ids)


def test_a_name_may_say_how_many_windows():
    assert get_recipe("best:48") == replace(RECIPES["best"], windows=48)
    assert get_recipe("plain") is RECIPES["plain"]
    for name in ("best:", "best:0", "best:many", "best:-3"):
        with pytest.raises(CalibrationError, match="expected a positive number"):
            get_recipe(name)
    with pytest.raises(CalibrationError, match="unknown recipe 'finest'"):
        get_recipe("finest:48")


def test_recipes_are_checked():
    with pytest.raises(CalibrationError, match="order"):
        Recipe("wrong", (Gptq(), Smooth()))
    with pytest.raises(CalibrationError, match="order"):
        Recipe("none", (Smooth(),))
    with pytest.raises(CalibrationError, match="no setting"):
        Recipe("good", (Gptq(),)).with_step(speed=1)
    changed = Recipe("good", (Smooth(), Gptq())).with_step(norm=0.5)
    assert changed.find(Smooth).norm == 0.5 and changed.describe()["steps"][0]["norm"] == 0.5
