"""Names of GPUs: what target they mean, and the facts that kernels get from it."""

from __future__ import annotations

import pytest

from amx_tvm import targets
from amx_tvm.errors import TargetError
from amx_tvm.targets.cuda import driver
from amx_tvm.targets.cuda.gpus import GPUS, gpu
from amx_tvm.targets.cuda.target import gpu_of, name_of, target
from relax_passes.kernels.base import TargetInfo

tvm = pytest.importorskip("tvm")


@pytest.mark.parametrize("arch", GPUS)
def test_target_carries_the_facts(arch):
    made = target(arch)
    assert gpu_of(made) == gpu(arch) == TargetInfo.of(made).gpu
    assert name_of(made) == arch


def test_instructions():
    assert gpu("sm_90a").wgmma and gpu("sm_90a").clusters and gpu("sm_90a").fp8
    assert gpu("sm_120").clusters and not gpu("sm_120").wgmma
    assert gpu("sm_89").fp8 and not gpu("sm_86").fp8


def test_attributes_of_a_target_come_first():
    made = target("sm_90a/114")
    assert gpu_of(made).multiprocessors == 114
    assert name_of(made) == "sm_90a/114" and name_of(target(name_of(made))) == "sm_90a/114"
    config = {"kind": "cuda", "arch": "sm_90a", "l2_cache_size_bytes": 1 << 20}
    assert gpu_of(tvm.target.Target(config)).l2_bytes == 1 << 20


def test_several_are_scheduled_for_the_one_that_can_least():
    made = target("sm_90a+sm_80+sm_89/58")
    assert gpu_of(made).arch == "sm_89" and gpu_of(made).multiprocessors == 58
    assert name_of(made) == "sm_89+sm_90a+sm_80/58"


@pytest.mark.parametrize("name", ["sm_50", "sm_80+sm_50", "", "sm_90a/", "sm_90a/many", "sm_90a/0"])
def test_other_names_are_refused(name):
    with pytest.raises(TargetError, match="expected"):
        target(name)


def test_unknown_architectures_of_other_targets_have_no_facts():
    """The registry then says that no rule answers."""
    assert TargetInfo.of({"kind": "cuda", "arch": "sm_50"}).gpu is None


def test_the_gpu_of_this_machine():
    if not driver.gpus_here():
        with pytest.raises(TargetError, match="there is none"):
            targets.resolve("cuda")
    else:
        resolved = targets.resolve("cuda")
        assert gpu_of(resolved.tvm).multiprocessors == driver.gpus_here()[0].multiprocessors
