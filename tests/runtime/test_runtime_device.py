"""What does not need a GPU of the device code: copies through device memory, and its checks."""

from __future__ import annotations

import numpy as np
import pytest

import amx_tvm.runtime
from amx_tvm.artifact import Manifest
from amx_tvm.errors import TargetError
from amx_tvm.runtime import vm
from amx_tvm.runtime.session import Model, Sequence
from amx_tvm.runtime.vm import VirtualMachine, _check_gpu


@pytest.fixture(scope="module")
def copying(artifact):
    """A machine on the CPU that copies as if the device had memory of its own."""
    machine = VirtualMachine(artifact / "lib.so", "cpu")
    machine.is_cpu = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vm, "_PINNED", 1)  # ordinary memory: pinned memory needs a driver
        yield machine


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "float16", "float32"])
@pytest.mark.parametrize("shape", [(3, 5), (4,), (1, 2, 3)])
def test_arrays_survive_the_copies(copying, dtype, shape):
    array = (np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
    tensor = copying.to_device(array)
    back = copying.to_host(tensor)
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype
    array[...] = 0
    np.testing.assert_array_equal(copying.to_host(tensor), back)  # a copy, not a view
    view = np.asfortranarray(back) if back.ndim > 1 else back[::-1]
    np.testing.assert_array_equal(copying.to_host(copying.to_device(view)), view)


def test_a_model_runs_on_copied_parameters(artifact, engine, copying):
    manifest = Manifest.load(artifact)
    parameters = copying.load_parameters(artifact, manifest)
    model = Model(copying, parameters, 300, 256, 32)
    cache = amx_tvm.runtime.kv.KVCache(copying, 1, 256, 32, 16)
    ids = list(range(1, 60))
    logits = Sequence(model, cache, cache.add(), []).append(ids)
    np.testing.assert_allclose(logits, engine.logits(ids)[-1], atol=1e-4)


def gpu(version, exists=True):
    return lambda kind: {0: exists, 4: version}[kind]


@pytest.mark.parametrize(
    ("version", "feature", "fits"),
    [
        ("9.0", "sm_90a", True),
        ("9.0", "sm_90", True),
        ("8.9", "sm_80", True),
        ("8.0", "sm_89", False),
        ("10.0", "sm_90", False),
        ("10.0", "sm_100a", True),
        ("12.1", "sm_120a", False),
        ("9.0", "fast", True),
    ],
)
def test_compute_capability(version, feature, fits):
    if fits:
        _check_gpu("cuda", gpu(version), [feature])
    else:
        with pytest.raises(TargetError, match=f"{feature}.*{version}"):
            _check_gpu("cuda", gpu(version), [feature])


def test_one_of_several_architectures_is_enough():
    _check_gpu("cuda", gpu("8.6"), ["sm_80", "sm_90a"])
    with pytest.raises(TargetError, match="sm_80, sm_90a.*12.0"):
        _check_gpu("cuda", gpu("12.0"), ["sm_80", "sm_90a"])


def test_missing_gpu_and_wrong_name(artifact):
    with pytest.raises(TargetError, match="no device 'cuda:3'"):
        _check_gpu("cuda:3", gpu("9.0", exists=False), [])
    for name in ("gpu", "cuda:x", "cpu:-1"):
        with pytest.raises(TargetError, match="expected cpu, cuda"):
            VirtualMachine(artifact / "lib.so", name)
