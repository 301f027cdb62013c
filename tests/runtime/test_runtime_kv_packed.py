"""Pages of keys and values in few bits: who has which, and what a step is told."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from amx_tvm.errors import ArtifactError
from amx_tvm.runtime.kv_packed import PackedPages

PAGE, STORED = 8, {"newest": 16, "first": 1, "page_bytes": 8, "sequence_bytes": 4}
MACHINE = SimpleNamespace(rows_of=lambda a: a, to_device=lambda a: a, tuple_of=tuple)


@pytest.fixture
def pages():
    made = np.zeros((12, 8), np.uint8), np.zeros((4, 4), np.uint8)
    made[0][:] = np.arange(12)[:, None]
    found = PackedPages(MACHINE, made, PAGE, STORED)
    found.add(0)
    return found


def step(pages, lengths):
    needed = sum(pages.needed(s, pages._lengths[s], n) for s, n in lengths.items())
    free = pages.available()
    pages.begin(list(lengths), list(lengths.values()))
    assert free - pages.available() == needed
    (given,) = pages.arguments
    return given[:3]


def test_a_step_says_where_its_rows_belong(pages):
    pages.add(1)
    step(pages, {0: 10})
    rows, told, tables = step(pages, {1: 3, 0: 2})
    np.testing.assert_array_equal(rows, [[0, 1, 2, 10, 11], [0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(told[:, :5], [[0, 3, 0, 0, 1], [3, 2, 10, 0, 0]])
    np.testing.assert_array_equal(tables, [[2, 0], [0, 1]])


def test_the_newest_are_in_16_bits_until_others_take_their_place(pages):
    for count, exact in ((10, 0), (6, 0), (1, 0), (20, 1), (1, 21)):
        _, told, _ = step(pages, {0: count})
        assert told[0, 3] == exact
    pages.pop(0, 4)  # 34 tokens: 22 to 33 are left of the newest
    assert step(pages, {0: 1})[1][0, 3] == 22
    pages.pop(0, 20)
    assert step(pages, {0: 1})[1][0, 3] == 15


def test_a_fork_shares_full_pages_and_copies_the_rest(pages):
    step(pages, {0: 20})
    pages._recent[0] = 7
    pages.fork(0, 1, 13, 20)
    _, told, tables = step(pages, {1: 1})
    np.testing.assert_array_equal(tables, [[0, 3]])
    assert (pages._pages[3] == 1).all() and (pages._recent[1] == 7).all()
    assert told[0, 3] == 4
    pages.fork(0, 2, 2, 20)
    assert step(pages, {2: 1})[1][0, 3] == 2  # behind the newest: all it has is rounded


def test_a_page_of_several_is_copied_before_it_is_written(pages):
    step(pages, {0: 20})
    pages.fork(0, 1, 16, 20)
    pages.pop(1, 5)
    _, _, tables = step(pages, {1: 1})
    np.testing.assert_array_equal(tables, [[0, 3]])
    assert (pages._pages[3] == 1).all()
    for sequence in (0, 1):
        pages.remove(sequence)
    assert pages.available() == 12


def test_a_library_of_other_sizes_is_refused():
    made = np.zeros((2, 9), np.uint8), np.zeros((1, 4), np.uint8)
    with pytest.raises(ArtifactError, match="9 bytes a page and 4 a sequence, the manifest says 8"):
        PackedPages(MACHINE, made, PAGE, STORED)
