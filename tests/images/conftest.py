from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_vision

import amx_tvm

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))


class Made:
    """A tiny model that takes images: torch's, its processor, its artifact, an engine."""

    def __init__(self, family: str, folder: Path):
        self.family, self.directory, self.artifact = family, folder / "model", folder / "out"
        self.model, self.processor = tiny_vision.make(family, self.directory)
        amx_tvm.compile(self.directory, quantization="none", output=self.artifact)
        self.engine = amx_tvm.load(self.artifact)


@pytest.fixture(scope="session", params=sorted(tiny_vision.CASES))
def made(request, tmp_path_factory):
    return Made(request.param, tmp_path_factory.mktemp(request.param))
