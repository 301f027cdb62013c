from __future__ import annotations

import pytest
import toy_artifact as toy

import amx_tvm.runtime


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    return toy.shared(tmp_path_factory)


@pytest.fixture(scope="session")
def engine(artifact):
    return amx_tvm.runtime.load(artifact)
