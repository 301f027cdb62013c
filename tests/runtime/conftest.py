from __future__ import annotations

import sys
from pathlib import Path

import pytest

import amx_tvm.runtime

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    import toy_artifact

    return toy_artifact.shared(tmp_path_factory)


@pytest.fixture(scope="session")
def engine(artifact):
    return amx_tvm.runtime.load(artifact)
