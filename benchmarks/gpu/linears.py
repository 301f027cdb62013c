"""Time prebuilt kernels on the GPU that is here, check every result, print a table and write JSON.

    python -m benchmarks.gpu.linears --kernels build/gpu --json FILE [--runtime FOLDER]
        [--peers] [--burst]

Every result is compared with the dense float32 product of the unpacked weights on fresh random x,
with y poisoned before; a kernel whose relative error passes 1e-3 or is NaN is reported as wrong,
not timed. The last table sums the best variant of each shape to one Llama-3-8B step. With --peers,
cuBLAS and every other library of benchmarks.gpu.peers that is importable run beside them, on
weights of the same shapes; those that are not, fail or are wrong are named with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from time import perf_counter

import torch

from . import harness, peers
from .shapes import SHAPES


def check(function, codes, scales, dense, rows: int) -> float:
    """Relative error of a kernel against the dense product, over x of unit variance."""
    n, k = dense.shape
    x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
    y = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.float16)
    function(x, codes, scales, y)
    torch.cuda.synchronize()
    expected = x.float() @ dense.T
    return float((y.float() - expected).norm() / expected.norm())


def time_variant(
    function, codes, scales, rows: int, n: int, k: int, burst: bool
) -> dict[str, float]:
    """Microseconds of one launch with weights from device memory: "us" and perhaps "us_burst"."""
    copies = codes.shape[0]
    x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
    y = torch.empty(rows, n, device="cuda", dtype=torch.float16)
    launch = lambda i: function(x, codes[i % copies], scales[i % copies], y)  # noqa: E731
    return harness.graph_time(launch, max(copies, 4), burst).named()


def measure_shape(
    shape: str, entries: list[dict], folder: Path, who: list[peers.Peer], burst: bool
) -> list[dict]:
    """Check and time all variants of one shape, and the peers."""
    n, k, _ = SHAPES[shape]
    codes, scales = harness.random_weights(n, k, harness.copies(n * k * 9 // 16))
    dense = harness.unpack(codes[0], scales[0])
    done = []
    for entry in entries:
        result = dict(entry)
        try:
            function = harness.load_function(folder / entry["library"])
            result["error_relative"] = check(function, codes[0], scales[0], dense, entry["rows"])
            if result["error_relative"] < 1e-3:
                result |= time_variant(function, codes, scales, entry["rows"], n, k, burst)
        except Exception as error:
            result["failure"] = str(error)[-300:]
            torch.cuda.synchronize()
        done.append(result)
    del codes, scales
    for peer in who:
        start = perf_counter()
        measured = peers.measure(peer, dense, sorted({e["rows"] for e in entries}), burst)
        done += [{"shape": shape, **result} for result in measured]
        torch.cuda.empty_cache()
        print(f"{shape}: {peer.name} took {perf_counter() - start:.1f} s", flush=True)
    return done


def contender(result: dict) -> str:
    """Whose result it is: "ours" or the peer's name."""
    return result.get("peer", "ours")


def label(result: dict) -> str:
    """What a table calls it: the peer, or the knobs of a variant of ours."""
    return result.get("peer") or result["knobs"]


def step_sums(results: list[dict], time: str = "us") -> dict[int, dict[str, float]]:
    """Milliseconds of a Llama-3-8B step's linears: {rows: {"ours" or peer: ms}}, by rows.

    The best variant of each shape counts; who has no time for a shape has no sum.
    """
    best: dict[tuple[int, str, str], float] = {}
    for result in results:
        if time in result:
            key = (result["rows"], contender(result), result["shape"])
            best[key] = min(result[time], best.get(key, math.inf))
    sums: dict[int, dict[str, float]] = {}
    for rows, who in sorted({(rows, who) for rows, who, _ in best}):
        if all((rows, who, shape) in best for shape in SHAPES):
            us = sum(best[rows, who, s] * launches for s, (_, _, launches) in SHAPES.items())
            sums.setdefault(rows, {})[who] = us / 1000
    return sums


def complaint(result: dict) -> str:
    """What to say of a result without a time."""
    if "us" in result:
        return "a replay takes longer than the burst"
    return result.get("failure") or f"WRONG {result.get('error_relative')}"


def report(results: list[dict], time: str = "us") -> None:
    """Print all variants by shape and rows, best first, then the sums of a step."""
    for shape in SHAPES:
        for rows in sorted({r["rows"] for r in results}):
            found = [r for r in results if r["shape"] == shape and r["rows"] == rows]
            timed = sorted((r for r in found if time in r), key=lambda r: r[time])
            if not found:
                continue
            line = ", ".join(f"{label(r)} {r[time]:.2f}" for r in timed)
            wrong = [f"{label(r)}: {complaint(r)}" for r in found if time not in r]
            print(f"{shape:8} m={rows:<5} {line} {' | '.join(wrong)}")
    for rows, sums in step_sums(results, time).items():
        print(f"\nstep of Llama-3-8B's linears, m={rows}, ms:")
        for who, ms in sorted(sums.items(), key=lambda item: item[1]):
            print(f"  {who:24} {ms:8.3f}")
        missing: dict[str, str] = {}
        for result in results:
            if result["rows"] == rows and contender(result) not in sums and time not in result:
                missing.setdefault(contender(result), f"{result['shape']}: {complaint(result)}")
        for who, why in missing.items():
            print(f"  {who:24} no sum, {why}")
        rivals = {who: ms for who, ms in sums.items() if who != "ours"}
        if rivals and "ours" in sums:
            rival = min(rivals, key=lambda who: rivals[who])
            print(f"  best peer {rival}: ours takes {sums['ours'] / rivals[rival]:.3f} of its time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runtime", help="folder of TVM's runtime libraries; default: the package")
    parser.add_argument("--peers", action="store_true", help="time all importable peers too")
    parser.add_argument("--burst", action="store_true", help="time the first 15 ms too")
    args = parser.parse_args()
    harness.load_runtime(args.runtime)
    torch.backends.cuda.matmul.allow_tf32 = False
    entries = json.loads((args.kernels / "manifest.json").read_text())
    found = {peer: peers.find(peer) for peer in peers.PEERS} if args.peers else {}
    document: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    document["peers"] = {peer.name: what for peer, what in found.items()}
    document["results"] = results = []
    for shape in SHAPES:
        mine = [e for e in entries if e["shape"] == shape and "error" not in e]
        if mine:
            who = [peer for peer, what in found.items() if "version" in what]
            results += measure_shape(shape, mine, args.kernels, who, args.burst)
            args.json.write_text(json.dumps(document, indent=1))
            torch.cuda.empty_cache()
    report(results)
    if args.burst:
        print("\nThe first 15 ms after a pause:")
        report(results, "us_burst")
    print()
    for name, what in document["peers"].items():
        print(f"{name}: {what.get('version') or what['failure']}")


if __name__ == "__main__":
    main()
