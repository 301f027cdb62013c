"""Products of E4M3: what kernels decode, bit for bit; compiled text and machine code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from cuda_compiled import compile_functions, cuda_text, needs_nvcc  # noqa: E402

from amx_tvm import formats  # noqa: E402
from amx_tvm.formats import e4m3, packing  # noqa: E402
from amx_tvm.formats.scales import E4M3 as NUMBERS  # noqa: E402
from amx_tvm.targets.cuda.gpus import gpu  # noqa: E402
from relax_passes.activation import E4M3  # noqa: E402
from relax_passes.kernels.cuda.intrinsics import arithmetic  # noqa: E402
from relax_passes.kernels.cuda.intrinsics.decode import decode_of  # noqa: E402
from relax_passes.kernels.cuda.intrinsics.e4m3 import decode_bytes, load_entries  # noqa: E402
from relax_passes.kernels.cuda.linear import function  # noqa: E402
from relax_passes.kernels.cuda.linear.buckets import Bucket  # noqa: E402
from relax_passes.kernels.cuda.linear.tile_plan import TileKnobs  # noqa: E402
from relax_passes.kernels.cuda.rows.e4m3 import round_rows  # noqa: E402
from relax_passes.spec import LinearSpec  # noqa: E402

NAMES = [name for name in formats.names() if e4m3.holds(formats.get(name))]
G = np.arange(32) // 4


def operand(registers: np.ndarray) -> np.ndarray:
    """A registers [32, 4] of a step as 16 rows of 32 bytes."""
    split = np.ascontiguousarray(registers).view(np.uint8).reshape(8, 4, 2, 2, 4)  # g t half h b
    return split.transpose(3, 0, 2, 1, 4).reshape(16, 32)


@pytest.mark.parametrize("name", NAMES)
def test_registers_hold_the_oracle_s_numbers(name):
    fmt, k = formats.get(name), 256
    weight = (np.random.default_rng(0).standard_normal((16, k)) * 0.05).astype(np.float32)
    quantized = fmt.quantize(weight)
    packed = packing.pack(fmt, quantized, e4m3.LAYOUT)
    table = packed["table"]
    factor = table[e4m3.FACTOR :].view(np.float32) * packed.get("tile_scale", np.ones(1))[0]
    words = packed["codes"][0].view(np.uint32).reshape(-1, 32, 4).transpose(1, 0, 2)
    records = packed["scales"][0].view(np.uint32).reshape(words.shape[1], 8, -1)
    records = records[:, G].transpose(1, 0, 2)
    fragments = decode_of(fmt, nibbles=True)
    load, decode = load_entries(fragments), decode_bytes(fragments)
    expected = e4m3.interleaved(e4m3.decoded(quantized))
    for step in range(k // 32):
        entries = load.meaning(step, records.reshape(32, -1), table[: e4m3.FACTOR])
        got = operand(decode.meaning(step, words.reshape(32, -1), entries))
        value = NUMBERS.values[got & 0x7F] * np.where(got & 0x80, -1, 1) * factor
        mine = expected[:, 32 * step : 32 * step + 32]
        np.testing.assert_allclose(value, mine, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_float16_registers_read_nibbles(name):
    """Kernels for few rows read the same codes."""
    fmt = formats.get(name)
    weight = (np.random.default_rng(0).standard_normal((16, 64)) * 0.05).astype(np.float32)
    quantized = fmt.quantize(weight)
    words = packing.pack(fmt, quantized, e4m3.LAYOUT)["codes"][0].view(np.uint32).reshape(32, 4)
    decode = decode_of(fmt, nibbles=True)
    for step in range(4):
        first = arithmetic.as_half2(decode.first.meaning(words[:, step : step + 1])[0])
        split = first.reshape(8, 4, 2, 2, 2).transpose(3, 0, 2, 1, 4).reshape(16, 16)
        codes = quantized.codes[:, 16 * step : 16 * step + 16]
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7]
        expected = np.where(codes & 8, -magnitudes, magnitudes) * 2.0**-14
        np.testing.assert_array_equal(split, expected.astype(np.float16))


@pytest.mark.parametrize(
    "knobs",
    [TileKnobs(64, 4, 6, producer=True, e4m3=True), TileKnobs(256, 2, 4, 1, 2, 1, True, True)],
    ids=["tile", "walk"],
)
@needs_nvcc
def test_machine_code_multiplies_e4m3(knobs):
    spec = LinearSpec("amxfp4", 512, 512, E4M3, out_dtype="float16")
    bucket = Bucket(None, replace(knobs, e4m3=True))
    made = compile_functions({"main": function.build(spec, gpu("sm_90a"), [bucket])}, "sm_90a")
    assert f"wgmma.mma_async.sync.aligned.m64n{knobs.block_m}k32.f32.e4m3.e4m3" in made.ptx
    assert made.clean()


def test_rounding_converts_by_instruction():
    made = cuda_text({"rows": round_rows(576, None, least=65)}, "sm_90a")
    assert "cvt.rn.satfinite.e4m3x2.f32" in made


def test_few_rows_are_not_rounded():
    """A step of one sequence launches nothing for it."""
    few, many = (str(round_rows(64, m, least=65)) for m in (1, 65))
    assert "amx_round_row" in many and "amx_round_row" not in few


@pytest.mark.parametrize(
    "spec",
    [
        LinearSpec("int4", 64, 64, E4M3, out_dtype="float16"),
        LinearSpec("amxfp4", 64, 72, E4M3, out_dtype="float16"),
        LinearSpec("amxfp4", 64, 64, E4M3, out_dtype="float16", experts=4),
    ],
    ids=["format", "columns", "experts"],
)
def test_linears_without_kernels(spec):
    assert not function.supported(spec)
