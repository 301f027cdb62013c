from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from relax_passes.activation import FLOAT32, INT8, four_bit
from relax_passes.spec import LinearSpec
from tuning.decisions import replay, trace_of
from tuning.search import Search, point_key
from tuning.spaces import Space, space_of


def fake_time(point):
    """A smooth landscape with one best point, (64, 2, 8)."""
    return (
        1
        + 0.1 * abs(math.log2(point["a"] / 64))
        + 0.2 * abs(point["b"] - 2)
        + 0.05 * abs(point["c"] - 8)
    )


SPACE = Space(
    {"a": (1, 4, 16, 64, 256), "b": (0, 1, 2, 3), "c": (2, 4, 8, 12)},
    {"a": 1, "b": 0, "c": 2},
    (1,),
)


def run(search, trials):
    for _ in range(trials):
        point = search.next()
        against = search.incumbent
        ratio = fake_time(point) / fake_time(against)
        search.measured(point, against, (ratio, ratio, ratio))


def test_finds_98_percent_of_the_best_in_a_fifth_of_the_points():
    best = min(map(fake_time, SPACE.points()))
    found = []
    for seed in range(6):
        search = Search(SPACE, seed)
        run(search, SPACE.size // 5)
        found.append(best / fake_time(search.incumbent) >= 0.98)
        ratio = fake_time(search.incumbent) / fake_time(SPACE.default)
        assert search.best_ratio == pytest.approx(ratio) == search.history[-1]
    assert sum(found) >= 4  # in random order, one of five would


def test_the_neighbours_of_the_default_come_first():
    search = Search(Space(SPACE.knobs, {"a": 16, "b": 0, "c": 12}, (1,)))
    around = [search.next() for _ in range(4)]
    assert around == [
        {"a": 4, "b": 0, "c": 12},
        {"a": 64, "b": 0, "c": 12},
        {"a": 16, "b": 1, "c": 12},
        {"a": 16, "b": 0, "c": 8},
    ]
    assert search.next() not in [*around, search.incumbent]


def test_every_point_once_then_none():
    search = Search(SPACE)
    run(search, SPACE.size - 1)
    assert search.next() is None and len(search.scores) == SPACE.size
    assert fake_time(search.incumbent) == min(map(fake_time, SPACE.points()))


def test_noise_and_failures_do_not_win():
    search = Search(SPACE)
    point = search.next()
    assert not search.measured(point, search.incumbent, (0.8, 0.97, 1.02))
    failed = search.next()
    search.failed(failed)
    assert search.incumbent == SPACE.default and failed != point
    assert search.next() not in (point, failed)
    assert search.trials == 2 and len(search.pending) == 1
    assert search.scores[point_key(failed)] == math.inf


def test_the_same_seed_proposes_the_same():
    searches = [Search(SPACE, 7) for _ in range(2)]
    for search in searches:
        run(search, 9)
    assert searches[0].scores == searches[1].scores


def test_traces_decide_what_is_replayed():
    trace = trace_of(SPACE, {"b": 3})
    text = json.dumps(trace, separators=(",", ":"))
    assert len(text) < 600
    assert replay(json.loads(text)) == {**SPACE.default, "b": 3}
    for edited in (
        text.replace("Categorical", "Categories"),
        "[]",
        text.replace("kernel", "other"),
    ):
        with pytest.raises(ValueError, match="does not replay"):
            replay(json.loads(edited))
    with pytest.raises(ValueError):
        trace_of(SPACE, {"b": 4})


def test_default_has_to_be_a_member():
    with pytest.raises(ValueError, match="no member"):
        Space({"a": (1, 2)}, {"a": 3}, (1,))


@pytest.mark.parametrize("m", [1, None])
@pytest.mark.parametrize("activation", [INT8, FLOAT32, four_bit("amxfp4")], ids=str)
@pytest.mark.parametrize("silu_mul", [False, True])
def test_spaces_hold_their_default_and_build(m, activation, silu_mul, target):
    from relax_passes.kernels.registry import linear_kernel

    spec = LinearSpec("amxfp4", 64, 64, activation, m=m, silu_mul=silu_mul)
    space = space_of(spec, target.tvm)
    points = list(space.points())
    assert points[0] == dict(space.default) and len(points) == space.size
    for point in (points[1], points[-1]):
        assert linear_kernel(spec, target.tvm, point).func is not None


def test_arm_panels_have_knobs():
    from tvm.target import Target

    from relax_passes.kernels.registry import linear_kernel

    options = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-v1"}
    spec = LinearSpec("amxfp4", 64, 64, INT8)
    space = space_of(spec, Target(options))
    assert space.default["panel_rows"] == 4 in space.knobs["panel_rows"]
    last = list(space.points())[-1]
    assert last["panel_tiles"] != space.default["panel_tiles"]
    assert linear_kernel(spec, Target(options), last).func is not None
    experts = space_of(replace(spec, experts=2), Target(options))
    assert "panel_rows" not in experts.knobs
