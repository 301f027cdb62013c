"""An artifact, compiled again from its own codes and scales, holds the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ArtifactError
from amx_tvm.exporting import ArtifactSource
from amx_tvm.frontends import open_model

CONFIGS = {
    "strict": QuantizationConfig("amxfp4", "float32"),
    "row scales": QuantizationConfig("amxfp4-e4m3-tensor"),
    "zero points": QuantizationConfig("int4"),
    "ignored": QuantizationConfig("nvfp4", ignored=("model.layers.0.*",)),
    "four bits": QuantizationConfig("amxfp4", "w4a4", attention=True, four_over_six=True),
    "overrides": QuantizationConfig(
        "mxfp4", overrides={"*.down_proj": "int8", "*.o_proj": "none"}, head="none"
    ),
}


@pytest.fixture(params=CONFIGS, scope="module")
def artifact(request, tiny_model, tmp_path_factory, compile_parameters):
    output = tmp_path_factory.mktemp("source") / "artifact"
    return compile_parameters(tiny_model, "x86-64-v3", CONFIGS[request.param], output)


def test_same_parameters_for_another_cpu(artifact, tmp_path, compile_parameters):
    source = ArtifactSource(artifact.path)
    again = compile_parameters(source, "x86-64-v2", source.quantization, tmp_path / "again")
    old, new = artifact.manifest, again.manifest
    assert new.parameters == old.parameters  # SHA-256 of every shard included
    assert new.model == old.model and new.quantization == old.quantization
    assert new.target.key != old.target.key


def test_weights_are_those_of_the_model(artifact, tiny_model):
    source, model = ArtifactSource(artifact.path), open_model(tiny_model)
    assert set(source.names()) == set(model.names())
    for name in source.names():
        assert source.shape(name) == tuple(model.shape(name))
        loaded, raw = source.load(name), source.load_raw(name)
        if raw is None:
            np.testing.assert_array_equal(loaded, model.load(name))
            continue
        quantized = raw.format.quantize(model.load(name))
        np.testing.assert_array_equal(raw.codes, quantized.codes)
        np.testing.assert_array_equal(loaded, raw.format.dequantize(quantized))


def test_weights_of_gpus_in_e4m3(tiny_model, tmp_path, compile_parameters):
    """Their table is a parameter that manifests know; as a source they are refused."""
    made = compile_parameters(tiny_model, "cuda:sm_90a", "amxfp4-w4a8", tmp_path / "gpu")
    recipe = made.manifest.recipes["model.layers.0.mlp.down_proj.weight.table"]
    assert (recipe["layout"], recipe["part"]) == ("cuda-fragment-e4m3", "table")
    with pytest.raises(ArtifactError, match="export from the model"):
        ArtifactSource(made.path)


def test_function_artifacts_are_refused(artifact, tmp_path, monkeypatch):
    from dataclasses import replace

    from amx_tvm.artifact import Manifest

    function = replace(artifact.manifest, kind="function")
    monkeypatch.setattr(Manifest, "load", lambda path: function)
    with pytest.raises(ArtifactError, match="of the kind function"):
        ArtifactSource(artifact.path)
