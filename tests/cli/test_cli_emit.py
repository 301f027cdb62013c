"""`inspect --emit`: one kernel at every level of its lowering."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import tvm
from tvm import relax

import amx_tvm
from amx_tvm.artifact import Manifest
from amx_tvm.compiler.emit import emit, find
from amx_tvm.errors import ArtifactError, TargetError
from relax_passes.activation import Activation
from relax_passes.chosen import ChosenKernel, chosen_kernels
from relax_passes.spec import LinearSpec


def compiled(tmp_path_factory, quantization, target):
    module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    place = tmp_path_factory.mktemp("emit") / "mlp"
    inputs = (torch.randn(2, 64),)
    amx_tvm.compile(module.eval(), target, quantization, place, example_inputs=inputs)
    return place


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return compiled(tmp_path_factory, "amxfp4", "x86-64-v4+vnni")


def check_levels(manifest, levels):
    """Every level of every kernel is text that parses, or comes out of LLVM."""
    names = [f"{entry.name}@{entry.spec.rows}" for entry in chosen_kernels(manifest.linears)]
    assert names
    for name in names:
        for level in levels:
            text = emit(manifest, level, name)
            assert name.split("@")[0] in text.splitlines()[0]
            if level in ("relax", "tensorir"):
                assert tvm.script.from_source(text) is not None
            else:
                assert "kernel" in text


def test_every_kernel_at_every_level(artifact):
    check_levels(Manifest.load(artifact), ("relax", "tensorir", "llvm", "asm"))


@pytest.mark.parametrize(
    ("quantization", "target"), [("amxfp4-w4a4", "x86-64-v3"), ("none", "x86-64-v2")]
)
def test_other_formats_and_targets(tmp_path_factory, quantization, target):
    place = compiled(tmp_path_factory, quantization, target)
    check_levels(Manifest.load(place), ("relax", "tensorir", "asm"))


@pytest.mark.parametrize(
    ("device", "spec"),
    [
        ("cpu", LinearSpec("none", 96, 64, bias=True, residual=True, out_dtype="float16")),
        ("cpu", LinearSpec("amxfp4", 96, 64, Activation.parse("int8"), silu_mul=True)),
        ("cpu", LinearSpec("nvfp4", 96, 64, experts=4, bias=True)),
        ("cuda", LinearSpec("amxfp4", 96, 64, Activation.parse("float16"), m_max=64)),
    ],
    ids=lambda value: getattr(value, "format", value),
)
def test_rows_that_are_a_variable_are_one_variable(device, spec):
    """Of the arguments, the call and the result: else TVM refuses to parse the text."""
    entry = ChosenKernel("up_proj+x", spec, "k").to_json()
    manifest = SimpleNamespace(linears=[entry], target=SimpleNamespace(device=device))
    function = tvm.script.from_source(emit(manifest, "relax"))["main"]
    result = relax.TensorType([function.params[0].ty.shape[0], spec.out_features], spec.out_dtype)
    call = function.body.blocks[0].bindings[0].value
    assert call.op.name == "amx.linear" and call.ty == function.ret_ty == result


def test_a_whole_name_comes_before_a_part_of_one():
    linears = [ChosenKernel(name, LinearSpec("amxfp4", 8, 32), "k") for name in ("10", "0", "01")]
    assert find(linears, "0").name == "0" and find(linears, "1").name == "10"


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
