"""The GPU benchmark's peers: what is missing or fails is named; sums and dense values are right."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu import linears, peers  # noqa: E402
from benchmarks.gpu.shapes import SHAPES  # noqa: E402


def refuse(dense):
    raise RuntimeError("no\nsuch GPU")


def test_a_peer_that_is_not_importable_says_why():
    peer = peers.Peer("nobody", "no_such_module", "nobody", refuse)
    assert peers.find(peer) == {
        "failure": "not importable: ModuleNotFoundError: No module named 'no_such_module'"
    }
    assert peers.find(peers.PEERS[0]) == {"version": importlib.metadata.version("torch")}


def test_failures_and_rows_left_out_are_results():
    peer = peers.Peer("nobody", "torch", "torch", refuse, most_rows=4, reason="too slow")
    assert peers.measure(peer, torch.zeros(2, 2), [1, 8], burst=False) == [
        {"rows": 1, "peer": "nobody", "failure": "RuntimeError: no such GPU"},
        {"rows": 8, "peer": "nobody", "failure": "too slow"},
    ]


def test_sums_of_a_step(capsys):
    results = []
    for shape in SHAPES:
        for us, knobs in ((2.0, "default"), (1.0, "other")):
            results.append({"shape": shape, "rows": 4, "knobs": knobs, "us": us})
        for name, us in (("slow", 8.0), ("fast", 0.5)):
            results.append({"shape": shape, "rows": 4, "peer": name, "us": us})
        lame = {"shape": shape, "rows": 4, "peer": "lame", "us": 1.0}
        results.append(lame)
    lame["error_relative"] = lame.pop("us")
    launches = sum(count for _, _, count in SHAPES.values())
    sums = linears.step_sums(results)
    assert list(sums) == [4]
    assert sums[4] == pytest.approx(
        {"ours": launches / 1000, "slow": launches / 125, "fast": launches / 2000}
    )
    linears.report(results)
    printed = capsys.readouterr().out
    assert f"lame                     no sum, {lame['shape']}: WRONG 1.0" in printed
    assert "best peer fast: ours takes 2.000 of its time" in printed.splitlines()[-1]


def test_dense_of_mxfp4():
    codes, scales, dense = peers.random_mxfp4(3, 96, device="cpu")
    for n in range(3):
        for k in range(96):
            code = int(codes[n, k // 2]) >> 4 * (k % 2) & 15
            exponent, mantissa = code >> 1 & 3, code & 1
            size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
            value = (-size if code & 8 else size) * 2.0 ** (int(scales[n, k // 32]) - 127)
            assert float(dense[n, k]) == value


def test_a_shape_without_configurations_takes_the_nearest():
    shipped = {
        "GEMM": {
            "(64, 1024, 4096, 128, 8, 104)": {"stages": 1},
            "(64, 2048, 4096, 128, 8, 104)": {"stages": 2},
            "(64, 9999, 4096, 64, 8, 104)": {"stages": 3},
        }
    }
    peers.borrow_configurations(shipped, 9999, 4096)
    assert shipped["GEMM"]["(64, 9999, 4096, 128, 8, 104)"] == {"stages": 2}
    assert len(shipped["GEMM"]) == 4
    peers.borrow_configurations(shipped, 1024, 4096)
    peers.borrow_configurations(shipped, 1024, 512)
    assert len(shipped["GEMM"]) == 4
