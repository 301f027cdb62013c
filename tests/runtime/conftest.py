from __future__ import annotations

import pytest

import amx_tvm.runtime
from tests.runtime import toy


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "artifact"
    toy.build(path)
    return path


@pytest.fixture(scope="session")
def engine(artifact):
    return amx_tvm.runtime.load(artifact)
