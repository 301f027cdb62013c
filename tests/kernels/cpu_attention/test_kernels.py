"""Every kernel of the cache, called by itself, against NumPy float64."""

import math
import platform
from dataclasses import replace

import numpy as np
import pytest

from relax_passes.attention_spec import Rotation
from relax_passes.kernels.cpu.attention import PAGE_SIZE, KVCacheConfig
from relax_passes.kernels.cpu.attention.vector import EMPTY_LSE

from .reference import attend, kernel, layers, plain, rotate, tensor, to_pages

SHAPES = {  # heads, kv_heads, head_dim
    "3:1": (9, 3, 64),
    "4:1": (8, 2, 128),
    "8:1": (16, 2, 64),
    "1:1": (3, 3, 64),
    "12:1 d80": (12, 1, 80),
}
# Every kernel with the shapes of SmolLM2 and Llama 3; the other shapes, and halves, when slow.
SLOW = pytest.mark.slow
COMMON = [("3:1", "float32"), ("4:1", "float32"), ("3:1", "float16")]
CASES = [
    (s, t) if (s, t) in COMMON else pytest.param(s, t, marks=SLOW)
    for s in SHAPES
    for t in ("float32", "float16")
]
TOLERANCE = {"float32": 3e-6, "float16": 2e-3}
ZERO = np.zeros(1, np.int32)


def make(shape, dtype="float32", page_size=PAGE_SIZE, **more):
    heads, kv_heads, d = SHAPES[shape]
    return KVCacheConfig(layers(1, heads, kv_heads, d, **more), dtype, page_size=page_size)


def normal(rng, *shape, dtype="float32"):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def i32(*values):
    return tensor(np.array(values, np.int32))


class Paged:
    """Sequences of given lengths in shuffled pages, with NaN in every slot that is not used."""

    def __init__(self, config, lengths, seed=0):
        self.rng = np.random.default_rng(seed)
        size = config.page_size
        counts = [-(-n // size) for n in lengths]
        total = sum(counts) + 3
        ids = self.rng.permutation(total)[: sum(counts)].astype(np.int32)
        shape = (total, 2, config.num_kv_heads, size, config.head_dim)
        pages = np.full(shape, np.nan, config.dtype)
        self.indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.k, self.v = [], []
        for i, n in enumerate(lengths):
            shape = (n, config.num_kv_heads, config.head_dim)
            k, v = (normal(self.rng, *shape, dtype=config.dtype) for _ in range(2))
            to_pages(k, v, ids[self.indptr[i] : self.indptr[i + 1]], pages, config)
            self.k.append(k)
            self.v.append(v)
        self.last = np.array([(n - 1) % size + 1 if n else 0 for n in lengths], np.int32)
        self.arguments = (tensor(pages), tensor(self.indptr), tensor(ids))


def check(out, lse, expected, dtype):
    want, want_lse = expected
    assert np.abs(out - want).max() < TOLERANCE[dtype]
    assert np.abs(lse - want_lse).max() < (2e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_decode(shape, dtype):
    config = make(shape, dtype)
    lengths = [1, 16, 17, 300, 0, 63]
    cache = Paged(config, lengths)
    b, heads, d = len(lengths), config.num_heads, config.head_dim
    q = normal(cache.rng, b, heads, d, dtype=dtype)
    out, lse = tensor(np.zeros((b, heads, d), dtype)), tensor(np.zeros((b, heads), np.float32))
    unused = tensor(np.zeros(b, np.int32))
    kernel("decode", config)(
        tensor(q), *cache.arguments, tensor(cache.last), unused, unused, out, lse,
        0, 1.0, 1e4, 1 / math.sqrt(d),
    )  # fmt: skip
    for i, n in enumerate(lengths):
        if n == 0:
            assert (out.numpy()[i] == 0).all()
            assert (lse.numpy()[i] == EMPTY_LSE).all()
            continue
        expected = attend(q[i : i + 1], cache.k[i], cache.v[i], [0], [n])
        check(out.numpy()[i], lse.numpy()[i], expected, dtype)


@pytest.mark.parametrize("length", [1000, 4099])
@pytest.mark.parametrize("page_size", [16, 64])
def test_decode_of_one_long_sequence_is_split(length, page_size):
    config = make("3:1", page_size=page_size)
    cache = Paged(config, [length])
    q = normal(cache.rng, 1, 9, 64) * 3  # some keys dominate
    out, lse = tensor(np.zeros((1, 9, 64), np.float32)), tensor(np.zeros((1, 9), np.float32))
    kernel("decode", config)(
        tensor(q), *cache.arguments, tensor(cache.last), tensor(ZERO), tensor(ZERO), out, lse,
        0, 1.0, 1e4, 0.125,
    )  # fmt: skip
    check(out.numpy(), lse.numpy(), attend(q, cache.k[0], cache.v[0], [0], [length]), "float32")


def seen_from(n, first, positions, window):
    """First of n keys from a position on that each query sees in a sliding layer."""
    return np.clip(np.asarray(positions) + 1 - window - first, 0, n)


def check_seen(out, lse, q, cache, i, low):
    """Compare rows with attention from `low` on; those that see no key are empty."""
    n = len(cache.k[i])
    some = low < n
    assert (out[~some] == 0).all() and (lse[~some] == EMPTY_LSE).all()
    if some.any():
        expected = attend(q[some], cache.k[i], cache.v[i], low[some], np.full(some.sum(), n))
        check(out[some], lse[some], expected, "float32")


def test_decode_of_a_sliding_layer():
    """Keys are lists of a fork's pages: the window ends in them, in front of them or behind."""
    config = make("3:1", windows=(40,), page_size=16)
    lengths, first = [60, 7, 100, 64, 30, 2000], [0, 5, 200, 16, 0, 64]
    positions = [59, 11, 302, 119, 49, 2063]
    cache = Paged(config, lengths)
    q = normal(cache.rng, 6, 9, 64)
    for scale in (-0.125, 0.125):
        out, lse = tensor(np.zeros((6, 9, 64), np.float32)), tensor(np.zeros((6, 9), np.float32))
        kernel("decode", config)(
            tensor(q), *cache.arguments, tensor(cache.last), i32(*first), i32(*positions), out, lse,
            0, 1.0, 1e4, scale,
        )  # fmt: skip
        for i, n in enumerate(lengths):
            low = seen_from(n, first[i], positions[i : i + 1], 40 if scale < 0 else 10**6)
            rows = slice(i, i + 1)
            check_seen(out.numpy()[rows], lse.numpy()[rows], q[rows], cache, i, low)


def ragged(config, lengths, causal=1, scale=None, seed=0):
    """Run the ragged kernel on sequences of new tokens; returns q, k, v, out, lse."""
    rng = np.random.default_rng(seed)
    n, d, dtype = sum(lengths), config.head_dim, config.dtype
    q = normal(rng, n, config.num_heads, d, dtype=dtype)
    k, v = (normal(rng, n, config.num_kv_heads, d, dtype=dtype) for _ in range(2))
    out = tensor(np.full((n, config.num_heads, d), np.nan, dtype))
    lse = tensor(np.full((n, config.num_heads), np.nan, np.float32))
    indptr = tensor(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    kernel("prefill_ragged", config)(
        tensor(q), indptr, tensor(k), tensor(v), indptr, tensor(np.zeros(n, np.int32)),
        tensor(np.zeros(len(lengths), np.int32)), out, lse, causal, 0, 1.0, 1e4,
        scale or 1 / math.sqrt(d),
    )  # fmt: skip
    return q, k, v, out.numpy(), lse.numpy()


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("lengths", [[1, 47, 130, 2, 16], [*[1] * 20, 5]])
def test_ragged_prefill(shape, dtype, lengths):
    config = make(shape, dtype)
    q, k, v, out, lse = ragged(config, lengths)
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        expected = attend(q[part], k[part], v[part], np.zeros(n), np.arange(n) + 1)
        check(out[part], lse[part], expected, dtype)
        start += n


@pytest.mark.parametrize("length", [48, 49, 127, 128, 129, 300])
def test_ragged_prefill_at_block_edges(length):
    q, k, v, out, lse = ragged(make("3:1"), [length])
    expected = attend(q, k, v, np.zeros(length), np.arange(length) + 1)
    check(out, lse, expected, "float32")


def test_ragged_prefill_without_mask():
    q, k, v, out, lse = ragged(make("3:1"), [50], causal=0)
    check(out, lse, attend(q, k, v, np.zeros(50), np.full(50, 50)), "float32")


def test_ragged_prefill_of_a_sliding_layer():
    """A negative scale marks the layer; the plain layers of the same cache see everything."""
    config = make("3:1", windows=(40,))
    high = np.arange(200) + 1
    q, k, v, out, lse = ragged(config, [200], scale=-0.125)
    check(out, lse, attend(q, k, v, np.maximum(high - 40, 0), high), "float32")
    q, k, v, out, lse = ragged(config, [200], scale=0.125)
    check(out, lse, attend(q, k, v, np.zeros(200), high), "float32")


def paged(config, cache, q, q_lengths, first=None, positions=None, sign=1):
    d = config.head_dim
    first = np.zeros(len(q_lengths), np.int32) if first is None else first
    positions = np.zeros(len(q), np.int32) if positions is None else positions
    out = tensor(np.full(q.shape, np.nan, config.dtype))
    lse = tensor(np.full(q.shape[:2], np.nan, np.float32))
    indptr = tensor(np.concatenate([[0], np.cumsum(q_lengths)]).astype(np.int32))
    kernel("prefill_paged", config)(
        tensor(q), indptr, *cache.arguments, tensor(cache.last), i32(*first), i32(*positions),
        out, lse, 0, 0, 1.0, 1e4, sign / math.sqrt(d),
    )  # fmt: skip
    return out.numpy(), lse.numpy()


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("page_size", [64, pytest.param(16, marks=SLOW)])
def test_paged_prefill(shape, dtype, page_size):
    config = make(shape, dtype, page_size=page_size)
    lengths, q_lengths = [5, 160, 0, 333, 0, 70], [3, 50, 4, 1, 1, 1]
    cache = Paged(config, lengths)
    q = normal(cache.rng, sum(q_lengths), config.num_heads, config.head_dim, dtype=dtype)
    out, lse = paged(config, cache, q, q_lengths)
    start = 0
    for i, (n, m) in enumerate(zip(lengths, q_lengths, strict=True)):
        part = slice(start, start + m)
        start += m
        if n == 0:
            assert (out[part] == 0).all()
            assert (lse[part] == EMPTY_LSE).all()
            continue
        expected = attend(q[part], cache.k[i], cache.v[i], np.zeros(m), np.full(m, n))
        check(out[part], lse[part], expected, dtype)


def test_paged_prefill_of_a_sliding_layer():
    """Keys that several sequences share have queries at any positions."""
    config = make("3:1", windows=(40,), page_size=16)
    lengths, first = [40, 20, 64], [0, 100, 32]
    positions = [np.arange(40, 100), np.arange(120, 125), np.r_[96:102, 101, 134, 150, 97:140]]
    q_lengths = [len(p) for p in positions]
    cache = Paged(config, lengths)
    q = normal(cache.rng, sum(q_lengths), 9, 64)
    for sign, window in ((-1, 40), (1, 10**6)):
        out, lse = paged(config, cache, q, q_lengths, first, np.concatenate(positions), sign)
        start = 0
        for i, (n, at) in enumerate(zip(lengths, positions, strict=True)):
            part = slice(start, start + len(at))
            start += len(at)
            check_seen(out[part], lse[part], q[part], cache, i, seen_from(n, first[i], at, window))


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(
    "rotation",
    [plain(64, 500000.0), plain(32), plain(40), replace(plain(64), factor=1.25), Rotation()],
    ids=["full", "rotary 32", "rotary 40", "with a factor", "none"],
)
def test_split_rotary(tokens, rotation):
    config = make("3:1", rotation=rotation)
    rng = np.random.default_rng(0)
    qkv = normal(rng, tokens, 15, 64)
    positions = rng.integers(0, 131072, tokens).astype(np.int32)
    results = [tensor(np.zeros((tokens, n, 64), np.float32)) for n in (9, 3, 3)]
    run = kernel("split_rotary", config)
    run(tensor(qkv), tensor(positions), *results, 1)
    q, k, v = (r.numpy() for r in results)
    assert np.abs(q - rotate(qkv[:, :9], positions, rotation)).max() < 1e-6
    assert np.abs(k - rotate(qkv[:, 9:12], positions, rotation)).max() < 1e-6
    assert (v == qkv[:, 12:]).all()
    run(tensor(qkv), tensor(positions), *results, 0)
    assert all(
        (r.numpy() == x).all() for r, x in zip(results, np.split(qkv, [9, 12], 1), strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("page_size", [16, 32])
def test_append_and_read_back(tokens, page_size, dtype):
    config = make("4:1", dtype, page_size=page_size)
    rng = np.random.default_rng(0)
    k, v = (normal(rng, tokens, 2, 128, dtype=dtype) for _ in range(2))
    pages = tensor(np.zeros((5, 2, 2, page_size, 128), dtype))
    positions = rng.permutation(5 * page_size)[:tokens].astype(np.int32)
    if tokens > 1:
        positions[3] = -1  # not kept
    kernel("append", config)(pages, tensor(k), tensor(v), tensor(positions))
    kept = np.flatnonzero(positions >= 0)
    read = [tensor(np.zeros((1, len(kept), 2, 128), dtype)) for _ in range(2)]
    kernel("debug_get_kv", config)(pages, tensor(positions[kept]), *read, 0)
    assert (read[0].numpy()[0] == k[kept]).all()
    assert (read[1].numpy()[0] == v[kept]).all()
    assert np.count_nonzero(pages.numpy()) <= 2 * len(kept) * 2 * 128
    expected = np.zeros(pages.shape, dtype)
    for t in kept:
        page, slot = divmod(int(positions[t]), page_size)
        one = np.zeros((page_size, 2, 128), dtype)
        for index, source in ((0, k), (1, v)):
            one[:] = 0
            one[slot] = source[t]
            only = np.zeros((1, *pages.shape[1:]), dtype)
            to_pages(one, one, [0], only, config)
            expected[page, index] += only[0, index]
    assert (pages.numpy() == expected).all()


def test_copy_single_page():
    config = make("3:1", page_size=16)
    pages = normal(np.random.default_rng(0), 4, 2, 3, 16, 64)
    copy = tensor(pages)
    kernel("copy_single_page", config)(copy, 1, 3, 7)
    expected = pages.copy()
    expected[3] = pages[1]
    assert (copy.numpy() == expected).all()


def test_compact_copy():
    config = make("3:1", page_size=16)
    rng = np.random.default_rng(0)
    k, v = (normal(rng, 64, 3, 64) for _ in range(2))
    pages = np.zeros((4, 2, 3, 16, 64), np.float32)
    to_pages(k, v, np.arange(4), pages, config)
    moved = tensor(pages)
    kernel("compact_copy", config)(
        moved, i32(0, 1, 3), tensor(np.array([[5, 20, 40], [3, 2, 50]], np.int32)), 2
    )
    k[[3, 2, 50]], v[[3, 2, 50]] = k[[5, 20, 40]], v[[5, 20, 40]]
    to_pages(k, v, np.arange(4), pages, config)
    assert (moved.numpy() == pages).all()


@pytest.mark.parametrize("tokens", [1, 20])
def test_merge_state(tokens):
    config = make("3:1")
    rng = np.random.default_rng(0)
    o1, o2 = (normal(rng, tokens, 9, 64) for _ in range(2))
    s1, s2 = (normal(rng, tokens, 9) * 20 for _ in range(2))
    s2[0, 0] = EMPTY_LSE
    out, lse = tensor(o1), tensor(s1)
    kernel("merge_state", config)(out, lse, tensor(o2), tensor(s2))
    a, b = np.exp2(s1.astype(np.float64)), np.exp2(s2.astype(np.float64))
    expected = (o1 * a[..., None] + o2 * b[..., None]) / (a + b)[..., None]
    assert np.abs(out.numpy() - expected).max() < 2e-6
    assert np.abs(lse.numpy() - np.log2(a + b)).max() < 2e-5


def test_rotation_inside_attention_is_refused():
    config = make("3:1")
    cache = Paged(config, [5])
    out, lse = tensor(np.zeros((1, 9, 64), np.float32)), tensor(np.zeros((1, 9), np.float32))
    with pytest.raises(Exception, match="normal RoPE mode"):
        kernel("decode", config)(
            out, *cache.arguments, i32(5), tensor(ZERO), tensor(ZERO), out, lse, 1, 1.0, 1e4, 0.1
        )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs x86-64 code")
@pytest.mark.parametrize("cpu", ["x86-64-v3", "x86-64"])
def test_lower_instruction_sets(cpu):
    """The same numbers with AVX2 and with SSE only (register tiles differ)."""
    target = {"kind": "llvm", "mcpu": cpu}
    config = make("4:1")
    cache = Paged(config, [77, 130])
    q = normal(cache.rng, 2, 8, 128)
    out, lse = tensor(np.zeros((2, 8, 128), np.float32)), tensor(np.zeros((2, 8), np.float32))
    unused = tensor(np.zeros(2, np.int32))
    scalars = (0, 1.0, 1e4, 1 / math.sqrt(128))
    kernel("decode", config, target)(
        tensor(q), *cache.arguments, tensor(cache.last), unused, unused, out, lse, *scalars
    )
    for i, n in enumerate((77, 130)):
        expected = attend(q[i : i + 1], cache.k[i], cache.v[i], [0], [n])
        check(out.numpy()[i], lse.numpy()[i], expected, "float32")
    one = slice(0, 1)
    kernel("prefill_paged", config, target)(
        tensor(q), i32(0, 1, 2), *cache.arguments, tensor(cache.last), unused, unused, out, lse,
        0, *scalars,
    )  # fmt: skip
    expected = attend(q[one], cache.k[0], cache.v[0], [0], [77])
    check(out.numpy()[one], lse.numpy()[one], expected, "float32")
    q, k, v = (normal(cache.rng, 70, n, 128) for n in (8, 2, 2))
    out, lse = tensor(np.zeros((70, 8, 128), np.float32)), tensor(np.zeros((70, 8), np.float32))
    indptr, unused = i32(0, 70), tensor(np.zeros(70, np.int32))
    kernel("prefill_ragged", config, target)(
        tensor(q), indptr, tensor(k), tensor(v), indptr, unused, tensor(ZERO), out, lse, 1, *scalars
    )
    expected = attend(q, k, v, np.zeros(70), np.arange(70) + 1)
    check(out.numpy(), lse.numpy(), expected, "float32")


@pytest.mark.parametrize("cap", [2.0, 50.0])
def test_bounded_scores(cap):
    config = make("3:1", soft_cap=cap)
    q, k, v, out, lse = ragged(config, [60])
    expected = attend(q, k, v, np.zeros(60), np.arange(60) + 1, cap)
    check(out, lse, expected, "float32")
    cache = Paged(config, [100])
    q = normal(cache.rng, 1, 9, 64) * 5
    out, lse = tensor(np.zeros((1, 9, 64), np.float32)), tensor(np.zeros((1, 9), np.float32))
    kernel("decode", config)(
        tensor(q), *cache.arguments, tensor(cache.last), tensor(ZERO), tensor(ZERO), out, lse,
        0, 1.0, 1e4, 0.125,
    )  # fmt: skip
    expected = attend(q, cache.k[0], cache.v[0], [0], [100], cap)
    check(out.numpy(), lse.numpy(), expected, "float32")
