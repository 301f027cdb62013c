"""The functions of a CUDA model as they are planned: parameters, and what a graph takes in."""

from __future__ import annotations

import pytest

tvm = pytest.importorskip("tvm")

from tvm import relax  # noqa: E402

from amx_tvm.config import QuantizationConfig  # noqa: E402
from amx_tvm.targets import resolve  # noqa: E402
from relax_passes import pipeline  # noqa: E402
from relax_passes.attention_spec import PLAIN, CacheStorage  # noqa: E402
from relax_passes.cache_spec import CacheSpec  # noqa: E402
from relax_passes.rewriting import relax_functions  # noqa: E402
from tests.passes.modules import decoder  # noqa: E402

LAYERS = 3
CHOICES = ["options", "counts", "masks", "biases"]
PARAMETERS = {
    "begin_each": ["rows", "cache", "state"],
    "begin_one": ["cache", "state"],
    "create_kv_cache": ["max_batch_size", "max_total_seq_len", "prefill_chunk_size"],
    "decode_each": ["given", "previous", *CHOICES, "cache", "state", "params"],
    "decode_one": ["input_ids", *CHOICES, "cache", "state", "params"],
    "forward": ["input_ids", "logit_positions", "cache", "state", "params"],
    "forward_each": ["input_ids", "cache", "state", "params"],
    "forward_one": ["input_ids", "cache", "state", "params"],
}


def lower(storage=PLAIN, **more):
    target = resolve("cuda:sm_90a")
    policy = QuantizationConfig.parse("amxfp4").resolve("cuda")
    module = decoder(LAYERS, **more)
    return pipeline.run(module, target.tvm, policy, target.layout, storage=storage)


@pytest.fixture(scope="module")
def lowered():
    return lower()


@pytest.fixture(scope="module")
def few():
    """The model with keys and values in few bits."""
    return lower(CacheStorage(packed=CacheSpec("amxfp4")), head_dim=64)


@pytest.fixture(scope="module")
def planned(lowered):
    return plan(lowered)


def plan(lowered):
    """What memory planning and graphs make of a module: printed functions by name."""
    target = resolve("cuda:sm_90a").tvm
    with target, tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        for one in pipeline.final_passes(target):
            if one.info.name == "VMShapeLower":
                break
            lowered = one(lowered)
    return {gvar.name_hint: f.script(show_meta=False) for gvar, f in relax_functions(lowered)}


def test_functions_take_what_the_runtime_gives(lowered):
    found = {g.name_hint: [p.name for p in f.params] for g, f in relax_functions(lowered)}
    assert found == PARAMETERS
    logits = {
        g.name_hint: f.ret_ty for g, f in relax_functions(lowered) if "forward" in g.name_hint
    }
    assert all(str(t.dtype) == "float32" for t in logits.values())
    state = lowered["create_kv_cache"].ret_ty.fields[1]
    assert isinstance(state, relax.TensorType) and str(state.dtype) == "int32"


@pytest.mark.parametrize("name", ["forward_one", "decode_one", "forward_each", "decode_each"])
def test_all_layers_of_a_step_are_one_graph(planned, name):
    step = planned[name]
    regions = [planned[n] for n in planned if n.startswith(f"{name}_cuda_graph_capture")]
    kernel = "attention_batch" if "each" in name else "attention_decode"
    (captured,) = [text for text in regions if kernel in text]
    assert captured.count(kernel) == LAYERS and kernel not in step
    assert not any("attention_with_fused_qkv" in text for text in regions)
    assert ("attention_with_fused_qkv" in step) == name.startswith("forward")
    assert ("choose(" in step) == name.startswith("decode")
    assert len(regions) == (2 if name == "forward_each" else 1)  # its plan, behind the beginning


def test_a_step_of_many_begins_with_a_plan(planned):
    begun = planned["begin_each"]
    assert begun.count("attention_plan") == 1 and "run_or_capture" not in begun
    assert "attention_plan" not in planned["decode_each"]
    assert "attention_plan" in planned["forward_each_cuda_graph_capture"]


def test_few_bits_are_told_in_a_tensor(few):
    """The same functions; no object of TVM's is asked, and all layers of a step are one graph."""
    assert {g.name_hint: [p.name for p in f.params] for g, f in relax_functions(few)} == PARAMETERS
    made = few["create_kv_cache"].ret_ty.fields
    assert [str(t.dtype) for t in made] == ["int32", "uint8", "float16", "int32", "int32"]
    printed = plan(few)
    assert not any("attention_with_fused_qkv" in text for text in printed.values())
    for name in ("forward_one", "decode_one", "forward_each", "decode_each"):
        captured = printed[f"{name}_cuda_graph_capture"]
        assert captured.count("attention_batch") == LAYERS and "attention_plan" not in captured
        assert ("attention_plan" in printed[name]) == name.startswith("forward")
    for name in ("begin_one", "begin_each"):
        assert printed[name].count("attention_plan") == 1
    assert printed["forward"].count("attention_prefill") == LAYERS
