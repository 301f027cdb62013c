"""A calibrated model, compiled: the engine computes what the torch reference says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amx_tvm.calibration import Gptq, Recipe, RotateValues, Smooth, calibrate
from amx_tvm.calibration.reference import Reference
from amx_tvm.config import QuantizationConfig

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
