"""A mixture's layer for GPUs: what is folded, how stacks are interleaved, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from amx_tvm.compiler.weights import interleaved_rows
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ModelError, TargetError
from amx_tvm.targets import resolve
from relax_passes.ops import Linear, is_op
from relax_passes.passes.annotate_linears import annotate_linears
from relax_passes.passes.fuse_epilogue import fuse_residual_and_gate
from relax_passes.passes.legalize import legalize
from relax_passes.passes.lower_experts import lower_experts
from relax_passes.passes.quantize_parameters import quantize_parameters

from .modules import mixture

CUDA, CPU = (resolve(name).tvm for name in ("cuda:sm_90a", "llvm"))
CONFIG = QuantizationConfig.parse("mxfp4").resolve("cuda")


def lowered(module, config=CONFIG):
    passes = (
        annotate_linears(config),
        fuse_residual_and_gate(CUDA),
        quantize_parameters(config, "cuda-fragment"),
        lower_experts(CUDA),
    )
    for one in passes:
        module = one(module)
    return module


def linears(module):
    values = (b.value for block in module["forward_each"].body.blocks for b in block.bindings)
    return [Linear.of(value) for value in values if is_op(value, "amx.linear")]


def test_biases_are_float32_whatever_the_model_computes_in():
    gate_up, _ = linears(lowered(mixture()))
    assert gate_up.bias.name.endswith(".float32") and gate_up.bias.ty.dtype == "float32"


def test_a_step_of_many_sequences_gathers_and_a_prompt_does_not():
    module = mixture()
    assert [linear.attrs.gathered for linear in linears(lowered(module))] == [2, 0]
    plain = module["forward_each"].without_attr("amx.each")
    module.update_func(module.get_global_var("forward_each"), plain)
    assert [linear.attrs.gathered for linear in linears(lowered(module))] == [0, 0]


def one_row(module):
    one = module["forward_each"].bind_symbolic_vars({"rows": 1})
    module.update_func(module.get_global_var("forward_each"), one)
    return module


def test_products_of_one_row_choose_its_experts_and_sum_them():
    module = lowered(one_row(mixture(inner=64)))
    assert [linear.attrs.chosen for linear in linears(module)] == [2, 2]
    assert [linear.attrs.gathered for linear in linears(module)] == [2, 0]
    assert [linear.attrs.joined for linear in linears(module)] == [False, True]
    text = module["forward_each"].script()
    assert not [word for word in ("route", "group", "take", "combine") if f"expert_{word}" in text]


def test_a_step_of_one_row_sorts_nothing():
    """Tensor scales differ between experts: their sum is a kernel of its own then."""
    module = lowered(one_row(mixture()), QuantizationConfig.parse("nvfp4").resolve("cuda"))
    assert [linear.attrs.listed for linear in linears(module)] == [True, True]
    assert [linear.attrs.gathered for linear in linears(module)] == [2, 0]
    text = module["forward_each"].script()
    assert "expert_group" not in text and "take" not in text


def test_every_part_of_a_stack_is_interleaved_for_itself():
    order = interleaved_rows(128, 16, stacked=2)
    assert order[:64].tolist() == interleaved_rows(64, 16).tolist()
    assert order[64:].tolist() == (interleaved_rows(64, 16) + 64).tolist()
    assert np.sort(order).tolist() == list(range(128))


def test_more_experts_than_kernels_choose_among_are_refused():
    with pytest.raises(ModelError, match="1025 experts.*compile for a CPU"):
        lowered(mixture(experts=1025))


def test_experts_whose_columns_no_kernel_takes_are_refused():
    config = QuantizationConfig.parse("none").resolve("cuda")
    module = lowered(mixture(inner=36), config)
    with pytest.raises(TargetError, match="no kernel for"):
        legalize(CUDA)(module)
