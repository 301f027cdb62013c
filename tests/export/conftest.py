from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "runtime")]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Hugging Face directory with a two-layer model of random weights."""
    import tiny_model

    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_artifact(tiny_model, tmp_path_factory):
    """The tiny model, compiled for any x86-64 with SSE4.2."""
    import amx_tvm

    output = tmp_path_factory.mktemp("artifacts") / "tiny"
    return amx_tvm.compile(tiny_model, "x86-64-v2", output=output, strict=True)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_artifact, tmp_path_factory):
    """The artifact, exported for a Raspberry Pi 4 without any runtime."""
    from export_tools import skip_without

    import amx_tvm

    skip_without("aarch64-linux-gnu-g++")

    output = tmp_path_factory.mktemp("bundles") / "tiny"
    return amx_tvm.export(tiny_artifact, "raspberry-pi/4b-aarch64", output, runtimes=())
