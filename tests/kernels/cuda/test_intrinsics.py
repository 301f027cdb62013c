"""What the intrinsics of CUDA kernels mean, against the formats' oracles; no GPU and no nvcc."""

from __future__ import annotations

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm import tirx  # noqa: E402
from tvm.script.ir_builder import IRBuilder  # noqa: E402
from tvm.script.ir_builder import tirx as T  # noqa: E402

from amx_tvm import formats  # noqa: E402
from amx_tvm.formats import cuda_layout  # noqa: E402
from relax_passes.kernels.cuda.intrinsics import (  # noqa: E402
    arithmetic,
    memory,
    products,
    sync,
    tiles,
)
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, Source  # noqa: E402
from relax_passes.kernels.cuda.intrinsics.decode import decode_of  # noqa: E402
from relax_passes.kernels.cuda.intrinsics.mma import MMA  # noqa: E402
from relax_passes.kernels.cuda.rows import rounding  # noqa: E402
from relax_passes.tir_pipeline import PIPELINE  # noqa: E402

LANE = np.arange(32)
G, T_ = LANE // 4, LANE % 4
NAMES = ("none", *formats.names())
SCALED = formats.names()
K = 256


class Packed:
    """A tile of 16 rows of W [16, K] as a warp's lanes hold it."""

    def __init__(self, name: str, seed: int = 0):
        rng = np.random.default_rng(seed)
        weight = (rng.standard_normal((16, K)) * 0.05).astype(np.float32)
        fmt = None if name == "none" else formats.get(name)
        self.decode = decode_of(fmt)
        self.shape = self.decode.shape
        if fmt is None:
            packed, self.dense = cuda_layout.pack_float16(weight), weight.astype(np.float16)
        else:
            quantized = fmt.quantize(weight)
            packed, self.dense = cuda_layout.pack(fmt, quantized), fmt.dequantize(quantized)
        self.dense = self.dense.astype(np.float64)
        self.tile_scale = float(packed.get("tile_scale", np.ones(1))[0])
        self.words = packed["codes"][0].view(np.uint32).reshape(-1, 32, 4)  # unit lane word
        self.records = None
        if "scales" in packed:
            records = packed["scales"][0].view(np.uint32).reshape(len(self.words), 8, -1)
            self.records = records[:, G]  # unit lane word

    def steps(self):
        """Yield (first column, words of the lanes, their record, group) of each 16 columns."""
        for unit, words in enumerate(self.words):
            for step in range(self.shape.unit // 16):
                first = step * self.decode.words
                group = step * 16 // self.shape.group if self.shape.group else 0
                record = None if self.records is None else self.records[unit]
                mine = words[:, first : first + self.decode.words]
                yield unit * self.shape.unit + step * 16, mine, record, group


def in_place(registers: np.ndarray) -> np.ndarray:
    """A step's four words a lane as 16 rows by 16 columns."""
    split = arithmetic.as_half2(registers).reshape(8, 4, 2, 2, 2)  # g t kh h e
    return split.transpose(3, 0, 2, 1, 4).reshape(16, 16).astype(np.float64)


def rows_of(coefficient: np.ndarray) -> np.ndarray:
    """A coefficient of rows g and g + 8, float [32, 2], as a column of 16 rows."""
    return coefficient.reshape(8, 4, 2)[:, 0].T.reshape(16, 1).astype(np.float64)


@pytest.mark.parametrize("name", NAMES)
def test_chains_and_coefficients_are_the_values(name):
    packed = Packed(name)
    decode = packed.decode
    for column, words, record, group in packed.steps():
        chains = decode.first.meaning(words)[: decode.chains]
        weights = (np.ones((32, 2)), None)
        if record is not None:
            weights = decode.coefficients.meaning(record, group)
        pairs = zip(weights[: decode.chains], chains, strict=True)
        value = sum(rows_of(weight) * in_place(chain) for weight, chain in pairs)
        expected = packed.dense[:, column : column + 16]
        got = value * decode.factor * packed.tile_scale
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_scaled_registers_are_the_values(name):
    packed = Packed(name)
    decode = packed.decode
    for column, words, record, group in packed.steps():
        pair = (None, None)
        if record is not None:
            pair = decode.half_coefficients.meaning(record, group)
        value = in_place(decode.half.meaning(words, *pair))
        expected = packed.dense[:, column : column + 16]
        # a product of float16 is rounded once, and below 2^-14 to 2^-25
        factor = decode.half_factor * packed.tile_scale
        np.testing.assert_allclose(value * factor, expected, rtol=2e-3, atol=2.0**-24 * factor)


def operand(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """B operand of 8 rows of x by 16 columns: words of the lanes."""
    halves = x.astype(np.float16).reshape(8, 2, 4, 2)  # n kh t e
    words = arithmetic.as_word(halves)[G, :, T_]
    return words[:, 0], words[:, 1]


def sums_in_place(c: np.ndarray) -> np.ndarray:
    """C registers [32, 4] as 16 rows of W by 8 columns."""
    return c.reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)


@pytest.mark.parametrize("name", SCALED)
def test_plain_form_multiplies(name):
    """Eight rows of x: chains over a group, then its scales."""
    packed, x = Packed(name), np.random.default_rng(1).standard_normal((8, K)).astype(np.float16)
    decode = packed.decode
    out, acc = np.zeros((32, 4), np.float32), np.zeros((32, 8), np.float32)
    for column, words, record, group in packed.steps():
        first = column % packed.shape.group == 0
        acc = products.step(decode).meaning(first, acc, words, *operand(x[:, column : column + 16]))
        if (column + 16) % packed.shape.group == 0:
            out = products.scale_plain(decode).meaning(out, acc, record, group)
    got = sums_in_place(out) * decode.factor * packed.tile_scale
    expected = packed.dense @ x.T.astype(np.float64)
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", [n for n in SCALED if formats.get(n).group_size == 32])
def test_block_diagonal_form_multiplies(name):
    """One row of x: column n of the operand is group n of eight, and lanes add up."""
    packed, x = Packed(name), np.random.default_rng(2).standard_normal(K).astype(np.float16)
    decode, shape = packed.decode, packed.shape
    acc = np.zeros((32, 8), np.float32)
    for index, (column, words, _, _) in enumerate(packed.steps()):
        block = np.zeros((8, 16), np.float16)
        block[column // 32] = x[column : column + 16]
        acc = products.step(decode).meaning(index == 0, acc, words, *operand(block))
    # the lane's two groups, 2 t and 2 t + 1, side by side
    groups = packed.records.transpose(1, 0, 2).copy().view(np.uint8).reshape(32, 8, -1)
    record = groups[LANE[:, None], np.stack([2 * T_, 2 * T_ + 1], 1)].reshape(32, -1)
    assert record.shape[1] == 4 * shape.scale_bytes
    record = record.view(np.uint32)
    out = products.scale_diagonal(decode).meaning(np.zeros((32, 2), np.float32), acc, record)
    for mask in (1, 2):
        out = np.stack([sync.SHUFFLE_ADD.meaning(out[:, h], mask) for h in range(2)], -1)
    got = rows_of(out)[:, 0] * decode.factor * packed.tile_scale
    expected = packed.dense @ x.astype(np.float64)
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_wide_form_multiplies(name):
    packed, x = Packed(name), np.random.default_rng(3).standard_normal((16, K)).astype(np.float16)
    decode = packed.decode
    acc = np.zeros((32, 8), np.float32)
    for column, words, record, group in packed.steps():
        both = [np.stack(operand(x[8 * i : 8 * i + 8, column : column + 16]), -1) for i in range(2)]
        acc = products.wide(decode).meaning(2, acc, words, record, group, np.stack(both))
    got = np.concatenate([sums_in_place(acc[:, :4]), sums_in_place(acc[:, 4:])], 1)
    got = got * decode.half_factor * packed.tile_scale
    expected = packed.dense @ x.T.astype(np.float64)
    assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_of_the_tile_schedule_multiplies(name):
    """64 columns: W decoded step by step, x through the swizzle and ldmatrix."""
    packed, x = Packed(name), np.random.default_rng(4).standard_normal((32, 64)).astype(np.float16)
    decode, shape, units = packed.decode, packed.shape, 64 // packed.shape.unit
    words = packed.words[:units].transpose(1, 0, 2).reshape(32, -1)
    record = None
    if packed.records is not None:
        record = packed.records[:units].transpose(1, 0, 2).reshape(32, -1)
    assert tiles.stage_words(decode) == (words.shape[1], units * shape.record // 4)
    stage = tiles.decode_stage(decode)
    a = np.concatenate([stage.meaning(step, words, record) for step in range(4)], -1)
    shared = np.zeros(32 * 128, np.uint8)
    for row in range(32):
        for chunk in range(8):
            place = tiles.swizzled(np.int64(row), np.int64(chunk))
            shared[place : place + 16] = x[row, 8 * chunk : 8 * chunk + 8].view(np.uint8)
    acc = tiles.TILE_MMA.meaning(32, np.zeros((32, 16), np.float32), a, shared, 0)
    got = np.concatenate([sums_in_place(acc[:, 4 * i : 4 * i + 4]) for i in range(4)], 1)
    got = got * decode.half_factor * packed.tile_scale
    expected = packed.dense[:, :64] @ x.T.astype(np.float64)
    assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()


def test_product_of_fragments():
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal(s).astype(np.float16) for s in ((16, 16), (8, 16)))
    split = a.reshape(2, 8, 2, 4, 2).transpose(1, 3, 2, 0, 4)  # g t kh h e
    words = arithmetic.as_word(split.reshape(32, 4, 2))
    got = sums_in_place(MMA.meaning(np.ones((32, 4), np.float32), words, *operand(b)))
    np.testing.assert_allclose(got, 1 + a.astype(np.float64) @ b.T.astype(np.float64), rtol=1e-5)


def test_loads_copies_and_matrices():
    data = np.arange(512, dtype=np.uint8)
    words = memory.LOAD_WEIGHTS[4].meaning(data, 16 * LANE)
    np.testing.assert_array_equal(words.reshape(-1), data.view(np.uint32))
    copied = memory.COPY16.meaning(data, 16 * LANE, LANE < 3)
    assert not copied[3:].any() and (copied[:3] == words[:3]).all()
    matrices = memory.MATRIX[4].meaning(data, 16 * LANE)
    # register i of lane (g, t) is word t of the row whose address lane 8 i + g has
    np.testing.assert_array_equal(matrices[9], words[8 * np.arange(4) + 2, 1])


def test_small_arithmetic():
    word = np.uint32(0x44332211)
    rec = np.array([0, word], np.uint32)
    assert arithmetic.BYTE.meaning(rec, 6) == 0x33
    assert arithmetic.HIGH.meaning(rec, 5, 7) == 0x44002200
    powers = arithmetic.POWER.meaning(np.array([104, 119, 127, 134], np.uint32))
    halves = powers.astype(np.uint16).view(np.float16)
    np.testing.assert_array_equal(halves, [0, 1, 2.0**8, 2.0**15])
    packed = arithmetic.PACK_HALF2.meaning(np.float32([1.0]), np.float32([-2.0]))
    assert packed == 0xC0003C00
    np.testing.assert_array_equal(arithmetic.ROW.meaning(packed, 1), [[-2.0, -2.0]])
    assert arithmetic.SILU.meaning(np.float32(0.0)) == 0


def test_text_holds_what_is_needed_once_and_in_order():
    text = products.scale_plain(decode_of(formats.get("amxfp4"))).full_text
    names = ("amx_h2(unsigned", "void amx_coef_", "void amx_scale_plain_")
    places = [text.index(name) for name in names]
    assert places == sorted(places)
    assert text.count("__half2 amx_h2(unsigned v)") == 1
    assert "amx_mma" not in text  # nothing that the call does not use


def test_two_texts_of_one_name_are_refused():
    one, other = Source("amx_x", "struct A {};"), Source("amx_x", "struct B {};")
    with pytest.raises(AssertionError, match="two texts"):
        _ = Intrinsic("amx_y", "", (one, other)).full_text


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: sync.SHUFFLE_ADD(tirx.const(1.0, "float32")), "1 arguments"),
        (lambda: sync.SHUFFLE_ADD(tirx.const(1, "int32"), 1), "int32 where"),
        (lambda: memory.SHARED_ADDRESS(tirx.const(1, "int32")), "int32 where"),
        (lambda: sync.FETCH_WAIT(), "template|arguments"),
        (lambda: sync.FETCH_WAIT[1, 2](), "template"),
        (lambda: sync.WARP_SYNC[1](), "template"),
    ],
)
def test_calls_are_typed(call, match):
    with pytest.raises(TypeError, match=match):
        call()


# -- TensorIR of row kernels, on the CPU


def on_cpu(expression, dtype: str, *arrays: np.ndarray) -> np.ndarray:
    """Evaluate an expression for each element of the arrays."""
    count = arrays[0].size
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"tirx.noalias": True})
            given = [T.arg(f"a{i}", T.Buffer((count,), str(a.dtype))) for i, a in enumerate(arrays)]
            out = T.arg("out", T.Buffer((count,), dtype))
            with T.serial(count) as i:
                with T.sblock("element"):
                    T.reads()
                    T.writes()
                    T.buffer_store(out, expression(*(a[i] for a in given)), [i])
    target = tvm.target.Target({"kind": "llvm"})
    built = tvm.compile(tvm.IRModule({"main": builder.get()}), target=target, tir_pipeline=PIPELINE)
    result = tvm.runtime.empty((count,), dtype)
    built["main"](*(tvm.runtime.tensor(a.reshape(-1)) for a in arrays), result)
    return result.numpy().reshape(arrays[0].shape)


FOUR_BIT = [n for n in formats.names() if formats.get(n).rule is not None]


@pytest.mark.parametrize("name", FOUR_BIT)
def test_rounding_is_the_format_s(name):
    """Bit for bit, with the extrema of groups taken here; products with a row's scale almost."""
    fmt = formats.get(name)
    rng = np.random.default_rng(6)
    x = rng.standard_normal((8, 256)).astype(np.float32)
    x *= np.exp2(rng.integers(-20, 8, x.shape)).astype(np.float32)
    x[3, :64] = 0
    x[4] = 0
    expected = fmt.quantize_dequantize(x, activation=True)
    groups = x.reshape(8, -1, fmt.group_size)
    two = len(fmt.scale_tensors) == 2

    def extremum(values: np.ndarray) -> np.ndarray:
        largest = np.maximum(values, 0).max(-1, keepdims=True)
        return np.broadcast_to(largest, groups.shape).reshape(x.shape).copy()

    high = extremum(groups if two else np.abs(groups))
    depth = extremum(-groups if two else np.abs(groups))
    row = np.broadcast_to(np.abs(x).max(1, keepdims=True) / np.float32(2688), x.shape).copy()

    def value(v, high, depth, row):  # noqa: ANN001, ANN202
        scales = [rounding.scale_of(fmt, m, row if fmt.row_scaled else None) for m in (high, depth)]
        return rounding.rounded(v, *scales)

    got = on_cpu(value, "float32", x, high, depth, row)
    np.testing.assert_allclose(got, expected, rtol=2e-7 if fmt.row_scaled else 0, atol=0)
