"""What manifests keep of a linear's kernel: one form, read as it was written."""

from __future__ import annotations

import json

import pytest

from amx_tvm.errors import ArtifactError
from relax_passes.activation import INT8
from relax_passes.chosen import ChosenKernel, chosen_kernels
from relax_passes.spec import LinearSpec

SPEC = LinearSpec("amxfp4", 64, 96, INT8, m_max=16, bias=True)
KERNEL = ChosenKernel("a+b", SPEC, "avx2", "AVX2", {1: "direct", 4: "merged", 32: "panel"}, "r")


def test_an_entry_is_read_as_it_was_written():
    for kernel in (KERNEL, ChosenKernel("a", LinearSpec("int8", 8, 32), "k", chain="chain")):
        kept = json.loads(json.dumps(kernel.to_json(), sort_keys=True))
        [read] = chosen_kernels([kept])
        assert read == kernel and list(read.rows) == list(kernel.rows)
    assert [str(spec.rows) for spec in (SPEC, SPEC.alone)] == ["M <= 16", "M >= 1"]
    assert str(LinearSpec("amxfp4", 8, 32, m=3).rows) == "M = 3"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spec": {"format": "amxfp4", "n": -1, "k": 32}}, "spec.n is -1"),
        ({"rows": {"few": "direct"}}, "rows are few; expected whole numbers"),
        ({"rows": {"1" * 5000: "direct"}}, "expected whole numbers"),
        ({"kernel": 3}, "kernel"),
    ],
)
def test_a_damaged_entry_is_named(changed, message):
    with pytest.raises(ArtifactError, match=message):
        chosen_kernels([KERNEL.to_json() | changed])
