"""Norms of heads in front of attention: folded on GPUs where they are norms of each head."""

from __future__ import annotations

import pytest

from amx_tvm.targets import resolve
from relax_passes.activation import FLOAT32
from relax_passes.attention_spec import PLAIN, CacheStorage
from relax_passes.cache_spec import CacheSpec
from relax_passes.ops import Attention, is_op
from relax_passes.passes.annotate_linears import annotate_linears
from relax_passes.passes.fuse_head_norms import fuse_head_norms
from relax_passes.passes.merge_projections import merge_projections

from .modules import Policy, decoder

CUDA, CPU = (resolve(name).tvm for name in ("cuda:sm_90a", "llvm"))
MERGED = (annotate_linears(Policy("amxfp4", FLOAT32)), merge_projections)


def run(passes, **more):
    module = decoder(1, **more)
    for one in passes:
        module = one(module)
    bindings = [b for block in module["forward"].body.blocks for b in block.bindings]
    (asked,) = (Attention.of(b.value) for b in bindings if is_op(b.value, "amx.attention"))
    return asked, {b.var: b.value for b in bindings}


def test_attention_reads_the_whole_product_and_normalizes_it():
    asked, values = run((*MERGED, fuse_head_norms(CUDA, PLAIN)), qk_norm="head")
    assert asked.spec.norm_eps == pytest.approx(1e-5)
    assert [norm.name.split(".")[-2] for norm in asked.norms] == ["q_norm", "k_norm"]
    reshape = values[asked.qkv]
    assert is_op(values[reshape.args[0]], "amx.linear")
    splits = [value for value in values.values() if is_op(value, "relax.split")]
    assert [len(split.ty.fields) for split in splits] == [2]  # gate and up


def test_parts_of_several_products_are_put_side_by_side():
    asked, values = run((fuse_head_norms(CUDA, PLAIN),), qk_norm="head")
    joined = values[values[asked.qkv].args[0]]
    assert asked.spec.norm_eps and is_op(joined, "relax.concat")
    assert all(is_op(values[part], "relax.matmul") for part in joined.args[0].fields)


@pytest.mark.parametrize(
    "target,storage,qk_norm",
    [
        (CPU, PLAIN, "head"),
        (CUDA, CacheStorage(packed=CacheSpec("int8")), "head"),
        (CUDA, PLAIN, "full"),
        (CUDA, PLAIN, ""),
    ],
)
def test_other_attention_stays(target, storage, qk_norm):
    asked, _ = run((*MERGED, fuse_head_norms(target, storage)), qk_norm=qk_norm)
    assert not asked.spec.norm_eps and not asked.norms
