"""What every pass makes of a small module, as text: tests/passes/golden/PASS.txt.

A pass that changes what it prints is meant to: look at the difference, then

    AMX_TVM_REWRITE_GOLDEN=1 python -m pytest tests/passes/test_golden.py
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

import pytest
import tvm
from tvm import relax

import relax_passes.passes
from amx_tvm.config import QuantizationConfig
from amx_tvm.targets import resolve
from relax_passes import pipeline
from relax_passes.activation import INT8
from relax_passes.adapters import AdapterPlan
from relax_passes.attention_spec import PLAIN, CacheStorage
from relax_passes.passes.adapt import adapt
from relax_passes.passes.annotate_linears import annotate_linears
from relax_passes.passes.buckets import make_buckets
from relax_passes.passes.bundle_parameters import bundle_parameters
from relax_passes.passes.device_steps import device_steps
from relax_passes.passes.fuse_conversions import fuse_conversions
from relax_passes.passes.fuse_epilogue import fuse_bias, fuse_residual_and_gate
from relax_passes.passes.fuse_head_norms import fuse_head_norms
from relax_passes.passes.half_precision import half_precision
from relax_passes.passes.keep_parameters import keep_parameters
from relax_passes.passes.legalize import legalize
from relax_passes.passes.lower_attention import lower_attention
from relax_passes.passes.lower_dense import lower_dense
from relax_passes.passes.lower_experts import lower_experts
from relax_passes.passes.lower_packed import lower_packed
from relax_passes.passes.merge_projections import merge_projections
from relax_passes.passes.order_shape_functions import order_shape_functions
from relax_passes.passes.patches import patches
from relax_passes.passes.quantize_activations import quantize_activations
from relax_passes.passes.quantize_parameters import quantize_parameters
from relax_passes.passes.schedule_rest import schedule_rest
from relax_passes.passes.share_tensors import share_tensors

from .modules import (
    Attending,
    Gated,
    Images,
    Loops,
    Planned,
    Policy,
    decoder,
    embedder,
    mixture,
    routed,
)
from .test_chains import network
from .test_order_shape_functions import dependent, module_of, same

GOLDEN = Path(__file__).parent / "golden"
# One CPU by name, so that what a kernel is called does not follow the machine.
TARGET = tvm.target.Target(
    {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3", "num-cores": 2}
)
CUDA = resolve("cuda:sm_90a").tvm
LAYOUT = "tile16x32"
EIGHT_BITS = Policy("amxfp4", INT8)
MIXTURE = QuantizationConfig.parse("mxfp4").resolve("cuda")

FOUND = (annotate_linears(EIGHT_BITS), fuse_bias())
MERGED = (*FOUND, merge_projections, fuse_residual_and_gate(TARGET))
QUANTIZED = (*MERGED, quantize_parameters(EIGHT_BITS, LAYOUT), quantize_activations(TARGET))

HALF = CacheStorage("float16")
MIXED = (annotate_linears(MIXTURE), fuse_residual_and_gate(CUDA))
PACKED = quantize_parameters(MIXTURE, "cuda-fragment")
BEGUN = (make_buckets(CUDA), lower_attention(CUDA, HALF))

# Of one of three merged projections, and of a gate.
LAYER = "model.layers.0"
ADAPTERS = AdapterPlan(
    count=2,
    ranks={f"{LAYER}.self_attn.v_proj.weight": 4, f"{LAYER}.mlp.gate_proj.weight": 3},
    rows={
        f"{LAYER}.self_attn.{name}_proj.weight": size
        for name, size in (("q", 64), ("k", 32), ("v", 32))
    }
    | {f"{LAYER}.mlp.{name}_proj.weight": 64 for name in ("gate", "up")},
)


def planned(until):
    """What plans memory, up to a pass."""
    passes = pipeline.final_passes(TARGET)
    return (bundle_parameters, *passes[: passes.index(until)])


# pass -> (module, what runs before, the pass)
CASES = {
    "annotate_linears": (Gated, (), FOUND[0]),
    "fuse_epilogue-bias": (Gated, FOUND[:1], FOUND[1]),
    "merge_projections": (Gated, FOUND, merge_projections),
    "fuse_epilogue-residual_and_gate": (Gated, MERGED[:-1], MERGED[-1]),
    "quantize_parameters": (Gated, MERGED, QUANTIZED[-2]),
    "quantize_activations": (Gated, QUANTIZED[:-1], QUANTIZED[-1]),
    "fuse_head_norms": (
        decoder(1, qk_norm="head"),
        (*FOUND, merge_projections),
        fuse_head_norms(CUDA, PLAIN),
    ),
    "adapt": (decoder(1, dtype="float32"), MERGED, adapt(ADAPTERS)),
    "buckets-cpu": (decoder(1), (), make_buckets(TARGET)),
    "buckets-cuda": (decoder(1), (), make_buckets(CUDA)),
    "lower_attention-cpu": (decoder(window=8), (), lower_attention(TARGET, HALF)),
    "lower_attention-cuda": (decoder(window=8), (make_buckets(CUDA),), lower_attention(CUDA, HALF)),
    "fuse_conversions": (
        decoder(1, dtype="float32"),
        (*QUANTIZED, lower_attention(TARGET, HALF)),
        fuse_conversions,
    ),
    "device_steps": (decoder(1), BEGUN, device_steps(CUDA)),
    "lower_experts-cpu": (routed(), (), lower_experts(TARGET)),
    "lower_experts-cuda": (mixture(), (*MIXED, PACKED), lower_experts(CUDA)),
    "lower_packed-cpu": (embedder(), (), lower_packed(TARGET)),
    "lower_packed-cuda": (embedder("float16"), (), lower_packed(CUDA)),
    "half_precision": (Images, (), half_precision(CUDA)),
    "patches": (Images, (half_precision(CUDA),), patches(CUDA)),
    "lower_dense": (Attending, (), lower_dense(CUDA)),
    "fuse_epilogue-experts": (mixture(), MIXED[:1], MIXED[1]),
    "legalize": (Gated, QUANTIZED, legalize(TARGET)),
    "chains": (network({"forward_one": 1}), QUANTIZED, legalize(TARGET)),
    "schedule_rest": (Loops, (), schedule_rest(TARGET)),
    "bundle_parameters": (Gated, QUANTIZED, bundle_parameters),
    "share_tensors": (Planned, planned(share_tensors), share_tensors),
    "keep_parameters": (Planned, planned(keep_parameters), keep_parameters),
    "order_shape_functions": (module_of(z=dependent, a=same), (), order_shape_functions),
}
# Whose result is TensorIR; of the others' kernels the head says enough.
WITH_LOOPS = ("schedule_rest", "order_shape_functions")


def printed(module, loops):
    """Print a module, its attributes a line an entry; kernels by name alone without loops."""
    functions = {
        gvar: function
        for gvar, function in module.functions_items()
        if loops or isinstance(function, relax.Function)
    }
    lines = [tvm.IRModule(functions).script(show_meta=False)]
    for name, value in sorted((module.attrs or {}).items()):
        found = json.loads(str(value))
        entries = found.items() if isinstance(found, dict) else enumerate(found)
        lines += ["", f"# {name}", *(f"# {key}: {json.dumps(entry)}" for key, entry in entries)]
    kernels = {gvar.name_hint for gvar in module.get_global_vars() if gvar not in functions}
    lines += ["", "# kernels", *(f"# {name}" for name in sorted(kernels))] if kernels else []
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_a_pass_prints_what_it_did(name):
    module, before, one = CASES[name]
    with TARGET:
        for earlier in before:
            module = earlier(module)
        text = printed(one(module), name in WITH_LOOPS)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("AMX_TVM_REWRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    kept = path.read_text(encoding="utf-8").splitlines()
    difference = difflib.unified_diff(kept, text.splitlines(), path.name, "now", lineterm="")
    assert text.splitlines() == kept, "\n".join(difference)


def test_every_pass_has_a_golden_file():
    folder = Path(relax_passes.passes.__file__).parent
    passes = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert passes == {name.partition("-")[0] for name in CASES}
    assert {f"{name}.txt" for name in CASES} == {path.name for path in GOLDEN.iterdir()}


def test_the_cases_follow_the_pipeline():
    ours = [
        one.info.name for _, passes in pipeline.phases(TARGET, EIGHT_BITS, LAYOUT) for one in passes
    ]
    last = {one.info.name for one in pipeline.final_passes(TARGET)}
    tested = {one.info.name for _, _, one in CASES.values()} - last
    assert tested == {name for name in ours if name in tested} and len(tested) == 20


def test_nothing_is_converted_around_attention_with_a_half_precision_cache():
    """Linears write halves and quantizations read them, in the order that the pipeline has."""
    module = decoder(1, dtype="float32")
    phases = pipeline.phases(TARGET, EIGHT_BITS, LAYOUT, storage=HALF)
    with TARGET:
        for one in (one for _, passes in phases for one in passes):
            if one.info.name == "LegalizeQuantized":
                break
            module = one(module)
    assert "astype" not in module.script() and 'out_dtype": "float16"' in module.script()
