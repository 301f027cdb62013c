"""Make the helpers beside these tests importable, and a small kernel with its record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from relax_passes.activation import INT8
from relax_passes.spec import LinearSpec
from tuning.kernels import identity
from tuning.records import Record

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def target():
    from amx_tvm.targets import resolve

    return resolve("llvm")


@pytest.fixture(scope="session")
def spec():
    return LinearSpec("amxfp4", 96, 64, INT8, m=1)


@pytest.fixture(scope="session")
def kernel(spec, target):
    return identity(spec, target.tvm, target.layout)


@pytest.fixture
def record(kernel, target):
    import tuning_points

    return Record(
        target=target.key,
        kernel=kernel,
        **tuning_points.edit(1024),
        rows=(1,),
        seconds=1e-6,
        default_seconds=2e-6,
        spread=(0.9e-6, 1.1e-6),
        ratio=(0.45, 0.5, 0.55),
        check={"error": 1e-7, "limit": 1e-5},
    )
