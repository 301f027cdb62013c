"""CUDA kernels compiled for real without a GPU: instructions meant, no spills, machine code."""

from __future__ import annotations

import re
import struct
from types import SimpleNamespace

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from cuda_compiled import ARCHITECTURES, compile_functions, needs_nvcc  # noqa: E402

from amx_tvm import formats  # noqa: E402
from amx_tvm.errors import TargetError  # noqa: E402
from amx_tvm.formats.cuda_layout import shape_of  # noqa: E402
from amx_tvm.targets.cuda import toolchain  # noqa: E402
from amx_tvm.targets.cuda.gpus import gpu  # noqa: E402
from amx_tvm.targets.cuda.target import architectures_of, gpu_of, target  # noqa: E402
from relax_passes.activation import FLOAT16  # noqa: E402
from relax_passes.kernels.cuda.linear import function  # noqa: E402
from relax_passes.kernels.cuda.linear.buckets import Bucket, default_buckets  # noqa: E402
from relax_passes.kernels.cuda.linear.buffers import format_of  # noqa: E402
from relax_passes.kernels.cuda.linear.gemv import GemvKnobs  # noqa: E402
from relax_passes.kernels.cuda.linear.gemv_plan import plan_of  # noqa: E402
from relax_passes.kernels.cuda.linear.tile import TileKnobs  # noqa: E402
from relax_passes.kernels.registry import linear_kernel  # noqa: E402
from relax_passes.spec import LinearSpec  # noqa: E402

pytestmark = needs_nvcc


def spec_of(fmt: str = "amxfp4", **more) -> LinearSpec:
    return LinearSpec(fmt, 256, 1024, FLOAT16, out_dtype="float16", **more)


def some_buckets(arch: str) -> list[Bucket]:
    """One bucket of each schedule: rows 1, 8, 16, 64 and any."""
    spec = spec_of()
    found = default_buckets(spec, shape_of(format_of(spec)), gpu(arch))
    return [b for b in found if b.rows in (1, 8, 16, 64, None)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_schedules_compile_with_their_instructions(arch):
    facts = gpu(arch)
    func = function.build(spec_of(), facts, some_buckets(arch), dependent=facts.clusters)
    made = compile_functions({"main": func}, arch)
    assert made.cubin[:4] == b"\x7fELF"
    kernels = "".join(re.split(r'extern "C" __global__', made.code)[1:])
    assert "amx_step_" in kernels and "amx_wide_" in kernels  # mma.sync, one and two column tiles
    assert ("amx_tile_wgmma_" in kernels) == facts.wgmma
    assert ("amx_tma_3d" in kernels) == facts.wgmma
    assert ("amx_tile_mma" in kernels) == (not facts.wgmma)
    assert ("amx_wait_prerequisites" in kernels) == facts.clusters
    assert made.clean(), made.report
    wide = (
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16",
        "cp.async.bulk.tensor.2d",
        "cp.async.bulk.tensor.3d",
        "mbarrier.try_wait.parity",
    )
    assert [text in made.ptx for text in wide] == [facts.wgmma] * len(wide)


def test_clusters_of_both_kinds_in_one_module():
    both = TileKnobs(16, 2, 8, cluster=4, share=2, producer=True)
    split = TileKnobs(64, 1, 6, cluster=4, producer=True)
    shared = TileKnobs(256, 2, 4, share=2, producer=True)
    walking = TileKnobs(256, 2, 4, share=2, producer=True, persistent=True)
    buckets = [Bucket(16, both), Bucket(64, split), Bucket(512, walking), Bucket(None, shared)]
    func = function.build(spec_of(), gpu("sm_90a"), buckets)
    clusters = re.findall(r'thread_binding\((\d+), thread="clusterCtaIdx.(.)"\)', func.script())
    assert clusters == [("8", "x"), ("4", "x"), ("2", "y"), ("2", "y")]
    assert len(instructions(compile_functions({"main": func}, "sm_90a").cubin)) == 4


@pytest.mark.parametrize(
    "knobs,match",
    [
        (TileKnobs(128, cluster=3), "divide the rows of x"),
        (TileKnobs(64, cluster=8, share=2), "at most 8 blocks"),
        (TileKnobs(16, producer=True, persistent=True), "64 rows of x"),
        (TileKnobs(256, persistent=True), "a producer"),
        (TileKnobs(8, 4, 5, producer=True), "even number of stages"),
    ],
)
def test_knobs_that_do_not_work_are_refused(knobs, match):
    with pytest.raises(ValueError, match=match):
        function.build(spec_of(), gpu("sm_90a"), [Bucket(knobs.block_m, knobs)])


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_registers_that_move_fit_the_multiprocessor(groups):
    knobs = TileKnobs(256, groups, producer=True)
    producer, consumer = knobs.registers(gpu("sm_90a"))
    at_launch = 65536 // (knobs.warps * 32) // 8 * 8 * knobs.warps * 32
    assert producer % 8 == consumer % 8 == 0 and consumer <= 255  # what setmaxnreg takes
    assert producer * 128 + consumer * groups * 128 <= at_launch


# The first 12 bits of an instruction of sm_90
LOAD_GLOBAL, WAIT_FOR_KERNEL_BEFORE = 0x981, 0x82E


def instructions(cubin: bytes) -> list[list[int]]:
    """Opcodes of each kernel of a cubin (ELF64), in order."""
    table, size, count, names = struct.unpack_from("<40xQ10xHHH", cubin)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]
    strings = headers[names][4]
    found = []
    for name, _, _, _, start, length in headers:
        if cubin[strings + name :].startswith(b".text."):
            words = np.frombuffer(cubin[start : start + length], "<u8")[::2]
            found.append([int(w) & 0xFFF for w in words])
    return found


@pytest.mark.parametrize("n,k", [(28672, 4096), (4096, 14336)])
def test_first_weights_are_requested_before_the_wait(n, k):
    """Dependent launch pays by this, and ptxas would rather load behind the wait."""
    spec = LinearSpec("amxfp4", n, k, FLOAT16, out_dtype="float16")
    found = default_buckets(spec, shape_of(format_of(spec)), gpu("sm_90a"))
    buckets = [b for b in found if isinstance(b.knobs, GemvKnobs)]
    func = function.build(spec, gpu("sm_90a"), buckets, dependent=True)
    kernels = instructions(compile_functions({"main": func}, "sm_90a").cubin)
    assert len(kernels) == len(buckets) >= 4
    for codes in kernels:
        assert LOAD_GLOBAL in codes
        before = codes[: codes.index(WAIT_FOR_KERNEL_BEFORE)]
        assert before.count(LOAD_GLOBAL) >= 2, "codes and scales of the first batch"


@pytest.mark.parametrize("n,k", [(5120, 2880), (201088, 2880), (960, 576), (4096, 4096)])
def test_warps_of_one_row_share_k_evenly(n, k):
    """Also where K is no multiple of 256: at most a tenth of the loads have no columns."""
    spec = LinearSpec("mxfp4", n, k, FLOAT16, out_dtype="float16")
    shape = shape_of(format_of(spec))
    knobs = default_buckets(spec, shape, gpu("sm_90a"))[0].knobs
    linear = SimpleNamespace(decode=SimpleNamespace(shape=shape), units=shape.units(k))
    plan = plan_of(linear, 1, knobs)
    assert plan.rounds * knobs.warps * plan.batch <= 1.1 * plan.chunks


# Shapes of Llama-3-8B whose defaults differ: many row tiles, few and a long K, few.
SHAPES = [
    (28672, 4096, (8, 16, 64, 128, 512, None)),
    pytest.param(4096, 14336, (16, 64, 128, 512), marks=pytest.mark.slow),
    pytest.param(6144, 4096, (4, 16, 32, 128, 512), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("n,k,rows", SHAPES)
def test_default_knobs_keep_the_pipeline(n, k, rows):
    """No spills, products not serialized by ptxas, x by multicast where blocks share it."""
    spec = LinearSpec("amxfp4", n, k, FLOAT16, out_dtype="float16")
    found = default_buckets(spec, shape_of(format_of(spec)), gpu("sm_90a"))
    buckets = [b for b in found if b.rows in rows]
    assert len(buckets) == len(rows)
    func = function.build(spec, gpu("sm_90a"), buckets, dependent=True)
    made = compile_functions({"main": func}, "sm_90a")
    assert len(made.resources()) == len(rows) and made.clean(), made.report
    shared = any(getattr(b.knobs, "share", 1) > 1 for b in buckets)
    assert ("amx_tma_2d_shared(" in made.code.split("main_kernel", 1)[1]) == shared


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", *formats.names()])
def test_every_format_and_epilogue(name):
    epilogues = [{}, {"bias": True, "residual": True}, {"silu_mul": True, "bias": True}]
    for more in epilogues[:: 1 if name == "amxfp4" else 2]:
        func = function.build(spec_of(name, **more), gpu("sm_90a"), dependent=True)
        assert compile_functions({"main": func}, "sm_90a").cubin[:4] == b"\x7fELF"


def test_registry_finds_the_rule():
    kernel = linear_kernel(spec_of(), target("sm_90a"))
    assert kernel.rule == "cuda-fragment" and "M = 16" in kernel.why


def test_reasons_are_those_of_the_target():
    """Many row tiles: up to 16 rows are the tile schedule's with wgmma, the other's without."""
    spec = LinearSpec("amxfp4", 8192, 1024, FLOAT16, out_dtype="float16")
    assert "mma.sync to M = 8;" in linear_kernel(spec, target("sm_90a")).why
    assert "mma.sync to M = 16;" in linear_kernel(spec, target("sm_80")).why


def test_blocks_that_persist_are_as_many_as_multiprocessors():
    knobs = TileKnobs(256, 2, 4, share=2, producer=True, persistent=True)
    for name, blocks in (("sm_90a", 132), ("sm_90a/115", 114)):
        func = function.build(spec_of(), gpu_of(target(name)), [Bucket(None, knobs)])
        assert f'thread_binding({blocks}, thread="blockIdx.y")' in func.script()


def test_unknown_architectures_are_refused():
    with pytest.raises(TargetError, match="sm_50"):
        target("sm_50")
    with pytest.raises(TargetError, match="expected one of"):
        toolchain.compile_source("__global__ void f() {}", "")


def test_library_holds_machine_code(tmp_path):
    toolchain.enable()
    func = function.build(spec_of(), gpu("sm_90a"), some_buckets("sm_90a")[:1])
    built = tvm.compile(tvm.IRModule({"main": func}), target=target("sm_90a"))
    built.export_library(str(tmp_path / "lib.so"))
    data = (tmp_path / "lib.so").read_bytes()
    assert data.count(b"\x7fELF") >= 2  # the library and the cubin inside
    assert b"#include <cuda_fp16.h>" not in data  # no source


def test_several_architectures_in_one_artifact(tmp_path):
    several = target("sm_90a+sm_80+sm_89")
    assert architectures_of(several) == ("sm_89", "sm_90a", "sm_80")  # least memory
    func = function.build(spec_of(), gpu("sm_89"), some_buckets("sm_89")[:1])
    built = tvm.compile(tvm.IRModule({"main": func}), target=several)
    built.export_library(str(tmp_path / "lib.so"))
    data = (tmp_path / "lib.so").read_bytes()
    assert (0xBA55ED50).to_bytes(4, "little") in data  # a fat binary
    with pytest.raises(TargetError, match="sm_50"):
        target("sm_80+sm_50")


def test_ptx_of_a_kernel():
    code = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
    text = toolchain.compile_source(code, "sm_90a", ptx=True).decode()
    assert ".target sm_90a" in text and ".entry twice" in text
