from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from serving import TEMPLATE, serving

import amx_tvm.runtime

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    import toy_artifact

    path = tmp_path_factory.mktemp("server") / "artifact"
    shutil.copytree(toy_artifact.shared(tmp_path_factory), path)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="session")
def served(artifact):
    with serving(artifact, kv_tokens=2048) as running:
        yield running


@pytest.fixture(scope="session")
def engine(artifact):
    """An engine of its own, to compare with."""
    return amx_tvm.runtime.load(artifact)
