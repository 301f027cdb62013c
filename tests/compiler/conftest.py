from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A Hugging Face directory with a two-layer model of random weights and a tokenizer."""
    import tiny_model

    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny")
