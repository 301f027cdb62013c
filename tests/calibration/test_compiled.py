"""A calibrated model, compiled: the engine computes what the torch reference says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from amx_tvm.calibration import Gptq, MixedPrecision, Plain, Recipe, RotateValues, Smooth, calibrate
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import CalibrationError
from benchmarks.torch_reference import Reference
from relax_passes.activation import four_bit
from relax_passes.spec import LinearSpec

from .tiny import TinySource

ALL = Recipe("all", (RotateValues(), Smooth(), Gptq()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amxfp4", "amxfp4-e4m3-tensor"])
@pytest.mark.parametrize("activation", ["float32", "w4a4"])
def test_engine_equals_the_reference(tmp_path, name, activation):
    from amx_tvm.compiler import compile as compile_model
    from amx_tvm.evaluation import Protocol, evaluate
    from amx_tvm.runtime import load

    source = TinySource()
    ids = torch.randint(0, 64, (6, 48), generator=torch.Generator().manual_seed(0))
    config = QuantizationConfig(format=name, activation=activation, head="none")
    calibration = calibrate(source, config, ids, ALL)
    path = tmp_path / "artifact"
    compile_model(
        source,
        quantization=calibration.config,
        overrides=calibration,
        output=path,
    )
    test = torch.randint(0, 64, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    reference = Reference(source, calibration=calibration)
    engine = load(path)
    want, got = reference(test[:48]), engine.logits(test[:48])
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < (1e-5 if activation == "float32" else 1e-3)
    result = evaluate(engine, test, reference=reference, protocol=Protocol(48))
    assert result.kl < 1e-3 and result.windows == 2


def test_a_recipe_needs_a_text(tmp_path):
    from amx_tvm.compiler import compile as compile_model

    with pytest.raises(CalibrationError, match="without a text"):
        compile_model(TinySource(), recipe="best", output=tmp_path / "artifact")
    short = tmp_path / "short.txt"
    short.write_text("abc " * 10)
    with pytest.raises(CalibrationError, match="needs 12288"):
        compile_model(TinySource(), calibration=short, output=tmp_path / "artifact")
    with pytest.raises(CalibrationError, match="known are"):
        compile_model(TinySource(), calibration=short, recipe="finest", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [short]


@pytest.mark.slow
def test_compile_calibrates_and_eval_warns_of_the_text(tmp_path):
    from amx_tvm.compiler import compile as compile_model
    from amx_tvm.evaluation import Protocol, evaluate

    rng = np.random.default_rng(0)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(48 + n) for n in rng.integers(0, 64, 20000)))
    other = tmp_path / "other.txt"
    other.write_text("".join(chr(48 + n) for n in rng.integers(0, 64, 500)))
    source = TinySource()
    mixed = Recipe("mixed", (MixedPrecision(bits=5.5), Plain()), windows=4, window=48)
    paths = []
    for recipe in (Recipe("few", (Plain(),), windows=4, window=48), mixed):
        paths.append(tmp_path / recipe.name)
        artifact = compile_model(
            source, quantization="amxfp4-w4a4", calibration=text, recipe=recipe, output=paths[-1]
        )
        told = artifact.manifest.quantization["recipe"]
        assert told["name"] == recipe.name and told["text"] == str(text)
    specs = [LinearSpec.from_json(entry["spec"]) for entry in artifact.manifest.linears]
    formats_used = {spec.format for spec in specs}
    assert formats_used == {"amxfp4", "int8"}
    schemes = {(spec.format, replace(spec.activation, outliers=False)) for spec in specs}
    assert ("amxfp4", four_bit("amxfp4")) in schemes
    assert all(a.integer for f, a in schemes if f == "int8")
    scores = [evaluate(path, other, protocol=Protocol(48)) for path in paths]
    assert scores[1].bits > scores[0].bits
    with pytest.warns(UserWarning, match="occurs in the calibration text"):
        evaluate(paths[0], text, protocol=Protocol(48, limit=3))
