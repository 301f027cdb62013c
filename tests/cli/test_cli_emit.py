"""`inspect --emit`: one kernel at every level of its lowering."""

from __future__ import annotations

import pytest
import torch

import amx_tvm
from amx_tvm.artifact import Manifest
from amx_tvm.compiler.emit import emit
from amx_tvm.errors import ArtifactError, TargetError


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    place = tmp_path_factory.mktemp("emit") / "mlp"
    amx_tvm.compile(
        module.eval(), "x86-64-v4+vnni", example_inputs=(torch.randn(2, 64),), output=place
    )
    return place


@pytest.mark.parametrize(
    "level, words",
    [
        ("relax", ("amx.linear", "amxfp4", "uint8", "int8")),
        ("tensorir", ("def kernel", "T.parallel", "uint8x64")),
        ("llvm", ("define", "kernel")),
        ("asm", (".text", "kernel")),
    ],
)
def test_levels(artifact, level, words):
    text = emit(Manifest.load(artifact), level, "2")
    assert text.splitlines()[0].endswith("2: amxfp4 32 x 96, M = 2")
    for word in words:
        assert word in text


def test_the_command_line(artifact, capsys):
    from amx_tvm.cli import main

    with pytest.raises(SystemExit) as done:
        main(["inspect", str(artifact), "--emit", "relax", "--kernel", "0"])
    assert done.value.code == 0
    assert "amx.linear" in capsys.readouterr().out


def test_errors_name_what_there_is(artifact):
    manifest = Manifest.load(artifact)
    with pytest.raises(ArtifactError, match="no linear is called 'head'; the first ones are 0, 2"):
        emit(manifest, "relax", "head")
    with pytest.raises(TargetError, match="no level 'ptx'.*relax, tensorir, llvm, asm"):
        emit(manifest, "ptx")
