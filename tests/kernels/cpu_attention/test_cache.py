"""A whole cache through the virtual machine, against attention over NumPy histories."""

from dataclasses import replace

import numpy as np
import pytest

from amx_tvm.errors import ModelError
from relax_passes.kernels.cpu.attention import KVCacheConfig

from .reference import Cache, layers, plain

CONFIGS = {
    "3:1": KVCacheConfig(layers(2, 6, 2, 64, plain(64, 500000.0)), page_size=16),
    "4:1 d128": KVCacheConfig(layers(1, 8, 2, 128, plain(128)), page_size=32),
    "8:1": KVCacheConfig(layers(1, 8, 1, 64, plain(64))),
    "1:1": KVCacheConfig(layers(1, 2, 2, 64, plain(32))),
    "capped, not rotated": KVCacheConfig(layers(1, 4, 2, 64, soft_cap=2.0)),
    "float16": KVCacheConfig(layers(1, 6, 2, 64, plain(64)), dtype="float16", page_size=16),
}
slow = pytest.mark.slow
FAST = ["3:1", "float16"]
ALL = [name if name in FAST else pytest.param(name, marks=slow) for name in CONFIGS]


def tolerance(config):
    return 3e-3 if config.dtype == "float16" else 5e-6


@pytest.fixture(params=ALL)
def cache(request):
    return Cache(CONFIGS[request.param])


def test_chunks_decode_fork_and_rollback(cache):
    cache.add(0)
    for n in (1, 1, 37, 128, 1, 1, 60, 1):
        cache.forward({0: n})
    cache.add(1)
    cache.forward({1: 7})
    cache.fork(0, 2)  # within a page: the page is copied
    cache.forward({0: 1, 1: 1, 2: 1})
    cache.forward({2: 5, 0: 33})
    cache.fork(2, 3, 100)
    cache.forward({3: 50})
    cache.pop(3, 60)  # into the shared part
    cache.forward({3: 1, 2: 1})
    cache.remove(2)
    cache.pop(0, 4)
    cache.forward({0: 1})
    cache.forward({1: 9, 3: 5})
    assert cache.worst < tolerance(cache.config)


def test_sequences_of_different_lengths_decode_together(cache):
    lengths = [1, 5, 16, 17, 33, 64, 100, 150]
    for seq, n in enumerate(lengths):
        cache.add(seq)
        cache.forward({seq: n})
    for _ in range(18):  # across a page
        cache.forward(dict.fromkeys(range(len(lengths)), 1))
    assert cache.worst < tolerance(cache.config)


def test_prefill_of_several_sequences_at_once():
    cache = Cache(CONFIGS["3:1"])
    for seq in range(3):
        cache.add(seq)
    cache.forward({0: 20, 1: 90, 2: 1})
    cache.forward({0: 70, 1: 1, 2: 60})
    assert cache.worst < 5e-6


def test_fork_at_a_page_boundary_and_many_children():
    cache = Cache(CONFIGS["3:1"], total=4096, batch=40)
    cache.add(0)
    cache.forward({0: 64})
    for child in range(1, 40):  # enough that the runtime coalesces the shared prefix
        cache.fork(0, child, 64)
    for _ in range(2):
        cache.forward(dict.fromkeys(range(1, 40), 1))
    assert cache.worst < 5e-6


def test_a_full_cache_is_reported():
    cache = Cache(CONFIGS["3:1"], total=32)
    cache.add(0)
    cache.forward({0: 32})
    with pytest.raises(Exception, match="full"):
        for _ in range(40):
            cache.forward({0: 1})


def test_rotation_does_not_depend_on_the_path():
    """One pass over 200 tokens and 200 single steps give the same attention."""
    one, many = Cache(CONFIGS["3:1"], seed=5), Cache(CONFIGS["3:1"], seed=5)
    one.add(0)
    many.add(0)
    one.forward({0: 200})
    for _ in range(200):
        many.forward({0: 1})
    assert max(one.worst, many.worst) < 5e-6
    assert one.history[0].shape == many.history[0].shape
    assert not np.isnan(one.history[0]).any()


@pytest.mark.parametrize("windows", [(0, 50), pytest.param((50,), marks=slow)])
def test_sliding_layers(windows):
    specs = layers(len(windows), 6, 2, 64, plain(64), windows)
    config = KVCacheConfig(specs, page_size=16)
    cache = Cache(config)
    cache.add(0)
    for n in (7, 1, 90, 1, 1, 120, 1, 30, *([1] * 20)):
        cache.forward({0: n})
    cache.add(1)
    cache.forward({1: 3})
    cache.forward({0: 1, 1: 1})
    assert cache.worst < 5e-6


@pytest.mark.parametrize("windows", [(0, 50), pytest.param((50,), marks=slow)])
def test_sliding_layers_of_forks(windows):
    """A fork's pages are its parent's and its own: a window may end in either."""
    specs = layers(len(windows), 6, 2, 64, plain(64), windows)
    cache = Cache(KVCacheConfig(specs, page_size=16))
    cache.add(0)
    cache.forward({0: 150})
    for child, position in enumerate((16, 40, 64, 120, -1), 1):
        cache.fork(0, child, position)
    every = range(6)
    for n in (1, 1, 3, 20, 1):
        cache.forward(dict.fromkeys(every, n))
    cache.fork(3, 6, 70)  # of a fork
    cache.pop(4, 12)  # to before the fork, and behind it
    cache.pop(1, 5)
    for n in (1, 7, 60, 1, 1):
        cache.forward({s: n for s in (6, 4, 0, 1)})
    assert cache.worst < 5e-6


def test_layers_that_rotate_differently():
    """The cache cannot rotate for them: tables and rotations stand in front of the attention."""
    first, second = layers(2, 6, 2, 64, plain(64))
    config = KVCacheConfig((first, replace(second, rotation=plain(64, 500000.0))), page_size=16)
    assert not config.rotation.pairs
    cache = Cache(config)
    cache.add(0)
    for n in (37, 1, 60, 1):
        cache.forward({0: n})
    assert cache.worst < 5e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "4 attention heads"),
        ({"head_dim": 72, "sinks": True}, "head_dim 72"),
        ({"rotation": plain(96)}, "rotary_dim 96"),
    ],
)
def test_bad_layers_are_named(change, message):
    (spec,) = layers(1, 4, 2, 64)
    with pytest.raises(ModelError, match=message):
        KVCacheConfig((replace(spec, **change),))


@pytest.mark.parametrize(
    ("more", "message"), [({"dtype": "int8"}, "int8"), ({"page_size": 24}, "page size 24")]
)
def test_bad_storage_is_named(more, message):
    with pytest.raises(ModelError, match=message):
        KVCacheConfig(layers(1, 4, 2, 64), **more)


@pytest.mark.parametrize("change", [{"window": 20}, {"heads": 8}, {"soft_cap": 1.0}])
def test_layers_of_other_kinds_are_refused(change):
    first, second = layers(2, 4, 2, 64, windows=(10, 0))
    with pytest.raises(ModelError, match="only windows"):
        KVCacheConfig((first, replace(second, **change)))
