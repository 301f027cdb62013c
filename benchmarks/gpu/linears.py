"""Time prebuilt kernels on the GPU that is here, check every result, print a table and write JSON.

    python -m benchmarks.gpu.linears --kernels build/gpu --json FILE [--runtime FOLDER]
        [--peers] [--burst]

Every result is compared with the dense float32 product of the unpacked weights on fresh random x,
with y poisoned before; a kernel whose relative error passes 1e-3 or is NaN is reported as wrong,
not timed. The last table sums the best variant of each shape to one Llama-3-8B step.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from . import harness
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
    count = max(copies, 4)
    return named(
        harness.graph_time(
            lambda i: function(x, codes[i % copies], scales[i % copies], y), count, burst
        )
    )


def named(times: harness.Times) -> dict[str, float]:
    """Times as results have them."""
    found = {"us": times.sustained, "us_burst": times.burst}
    return {name: us for name, us in found.items() if not math.isnan(us)}


def time_dense(dense, rows: int, burst: bool) -> dict[str, float]:
    """cuBLAS through torch: the same product with bfloat16 weights."""
    weight = dense.to(torch.bfloat16)
    copies = max(1, -(-harness.L2_FACTOR_BYTES // (weight.numel() * 2)))
    weights = [weight] + [weight.clone() for _ in range(copies - 1)]
    x = torch.randn(rows, weight.shape[1], device="cuda", dtype=torch.bfloat16)
    y = torch.empty(rows, weight.shape[0], device="cuda", dtype=torch.bfloat16)
    launch = lambda i: torch.mm(x, weights[i % copies].T, out=y)  # noqa: E731
    return named(harness.graph_time(launch, max(copies, 4), burst))


def measure_shape(
    shape: str, entries: list[dict], folder: Path, peers: bool, burst: bool
) -> list[dict]:
    """Check and time all variants of one shape."""
    n, k, _ = SHAPES[shape]
    copies = max(1, -(-harness.L2_FACTOR_BYTES // (n * k * 9 // 16)))
    codes, scales = harness.random_weights(n, k, copies)
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
    if peers:
        for rows in sorted({e["rows"] for e in entries}):
            times = time_dense(dense, rows, burst)
            done.append({"shape": shape, "rows": rows, "knobs": "cuBLAS bf16", **times})
    return done


def report(results: list[dict], time: str = "us") -> None:
    """Print all variants by shape and rows, best first, then the sums of a step."""
    best: dict[tuple[str, str, int], float] = {}
    for shape in SHAPES:
        for rows in sorted({r["rows"] for r in results}):
            found = [r for r in results if r["shape"] == shape and r["rows"] == rows]
            timed = sorted((r for r in found if time in r), key=lambda r: r[time])
            if not found:
                continue
            line = ", ".join(f"{r['knobs']} {r[time]:.2f}" for r in timed)
            wrong = [
                f"{r['knobs']} WRONG {r.get('error_relative')} {r.get('failure', '')}"
                for r in found
                if "us" not in r
            ]
            print(f"{shape:8} m={rows:<5} {line} {' | '.join(wrong)}")
            for result in reversed(timed):
                who = "cuBLAS" if result["knobs"].startswith("cuBLAS") else "ours"
                best[who, shape, rows] = result[time]
    for who, rows in sorted({(w, r) for w, _, r in best}):
        if all((who, shape, rows) in best for shape in SHAPES):
            total = sum(best[who, s, rows] * launches for s, (_, _, launches) in SHAPES.items())
            print(f"step of Llama-3-8B's linears, m={rows}, {who}: {total / 1000:.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runtime", help="folder of TVM's runtime libraries; default: the package")
    parser.add_argument("--peers", action="store_true", help="time cuBLAS too")
    parser.add_argument("--burst", action="store_true", help="time the first 15 ms too")
    args = parser.parse_args()
    harness.load_runtime(args.runtime)
    torch.backends.cuda.matmul.allow_tf32 = False
    entries = json.loads((args.kernels / "manifest.json").read_text())
    results = []
    for shape in SHAPES:
        mine = [e for e in entries if e["shape"] == shape and "error" not in e]
        if mine:
            results += measure_shape(shape, mine, args.kernels, args.peers, args.burst)
            torch.cuda.empty_cache()
    document = {"device": torch.cuda.get_device_name(), "results": results}
    args.json.write_text(json.dumps(document, indent=1))
    report(results)
    if args.burst:
        print("\nThe first 15 ms after a pause:")
        report(results, "us_burst")


if __name__ == "__main__":
    main()
