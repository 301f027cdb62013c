"""Will it fit: what is said before compiling, against what came out, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import amx_tvm
from amx_tvm.compiler import footprint as module
from amx_tvm.compiler import kept
from amx_tvm.compiler.footprint import footprint
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ModelError, TargetError
from amx_tvm.frontends import open_model
from amx_tvm.runtime.budget import kv_bytes
from amx_tvm.targets import resolve


def estimate(model, quantization="amxfp4", target="llvm"):
    resolved = resolve(target)
    config = QuantizationConfig.parse(quantization)
    return footprint(
        open_model(model), config.resolve(resolved.device, resolved.features), resolved
    )


@pytest.mark.parametrize(
    ("quantization", "cache"),
    [("amxfp4", "auto"), ("none", "auto"), ("int4", "int8"), ("nvfp4", "amxfp4")],
)
def test_the_estimate_is_what_is_written(model, tmp_path, quantization, cache):
    """The padding of this model's few rows is all that the estimate leaves out."""
    config = QuantizationConfig(
        quantization, kv_cache=cache, head="none" if quantization == "none" else "auto"
    )
    if cache != "auto":
        import tiny_model

        model = tiny_model.write_model(tmp_path / "model", head=32)
    said = []
    made = amx_tvm.compile(
        model, quantization=config, output=tmp_path / "out", progress=lambda *s: said.append(s)
    ).manifest
    found = estimate(model, config)
    assert found.parameters == pytest.approx(made.parameters.bytes, rel=0.05)
    assert found.token == kv_bytes(made)
    assert [detail for stage, *_, detail in said if stage == "fit"] == [str(found)]


def test_gpus_keep_floats_in_half(model):
    on_gpu, here = (estimate(model, "none", target) for target in ("cuda:sm_90a", "llvm"))
    assert 2 * on_gpu.parameters == here.parameters
    assert on_gpu.target == "cuda:sm_90a" and here.target.startswith("llvm:")


def test_too_little_memory(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda swap: 100_000_000)
    with pytest.raises(ModelError, match="needs about 350 MB of memory.*100 MB are available"):
        amx_tvm.compile(model, output=tmp_path / "out")
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(module, "available_memory", lambda swap: None)  # a system that is silent
    estimate(model).require(tmp_path / "not" / "there")


def test_a_gpu_that_does_not_hold_it(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = SimpleNamespace(name="a small GPU", memory=10_000)
    monkeypatch.setattr(kept, "gpus_here", lambda: [gpu])
    monkeypatch.setattr(kept, "resolve", lambda target: resolve("cuda:sm_90a"))
    monkeypatch.setattr(kept, "compile", lambda *given, **named: pytest.fail("compiled"))
    with pytest.raises(TargetError, match="of parameters, and a small GPU holds 10 kB"):
        kept.kept_artifact(model, "cuda")


@pytest.mark.parametrize(("quiet", "lines"), [([], 1), (["--quiet"], 0)])
def test_run_says_it_before_it_compiles(model, tmp_path, quiet, lines):
    done = subprocess.run(
        [sys.executable, "-m", "amx_tvm", "run", model, "hello", "-n", "2", *quiet],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "40"},  # it stays a line
        capture_output=True,
        text=True,
    )
    assert done.stderr.count("of disk, 350 MB of memory to compile and") == lines, done.stderr
