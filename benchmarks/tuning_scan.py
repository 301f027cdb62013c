"""Compare the tuner's search with an exhaustive scan of the same knobs, on this CPU.

    python -m benchmarks.tuning_scan build --out build/scan      compile every point (minutes)
    python -m benchmarks.tuning_scan measure --out build/scan    time every point beside the default
    python -m benchmarks.tuning_scan confirm --out build/scan    time the fastest of them once more
    python -m benchmarks.tuning_scan report --out build/scan     the scan's best, and searches

The report replays the search on the scan's figures for many seeds: how often a tenth of the trials
(of the space's points) is enough to reach 98 % of the best point's speed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from relax_passes.schedules.spec import LinearSpec

KERNELS = {
    "down": LinearSpec("amxfp4", 576, 1536, "int8", residual=True),
    "gate_up": LinearSpec("amxfp4", 3072, 576, "int16", silu_mul=True),
}
TURNS = 7
CONTROL = "control"  # the default once more, under another name
CONFIRMED, CONFIRM_TURNS = 12, 25  # the fastest points of a scan owe some of that to noise
SEEDS = 20


def space_here(spec: LinearSpec) -> Any:
    from amx_tvm.targets import resolve
    from tuning.spaces import space_of

    return space_of(spec, resolve("llvm").tvm)


def build(out: Path) -> None:
    """Compile and link every point that is not there yet."""
    from amx_tvm.targets import resolve
    from tuning.kernels import build as build_kernel

    target = resolve("llvm").tvm
    import tvm

    for name, spec in KERNELS.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        points = list(space_here(spec).points())
        for number, point in enumerate(points):
            path = folder / f"{number:04}.so"
            if path.exists():
                continue
            func = build_kernel(spec, target, point).func.with_attr("global_symbol", "f")
            tvm.compile(tvm.IRModule({"f": func}), target).export_library(str(path))
        (folder / "points.json").write_text(json.dumps(points))
        print(f"{name}: {len(points)} points")


def confirm(out: Path, names: list[str]) -> None:
    """Time the fastest points of a scan once more, longer, all of them in turns."""
    import tvm

    from amx_tvm.targets import resolve
    from tuning.search import ratios
    from tuning.worker import Bench, Server

    for name in names:
        spec, folder = KERNELS[name], out / name
        points = json.loads((folder / "points.json").read_text())
        content = json.loads((folder / "scan.json").read_text())
        table = content["ratios"]
        order = sorted(
            range(1, len(points)), key=lambda i: table[json.dumps(points[i], sort_keys=True)][1]
        )[:CONFIRMED]
        bench = Bench(spec, resolve("llvm").tvm, space_here(spec).rows)
        kernels = [
            tvm.runtime.load_module(str(folder / f"{number:04}.so"))["f"] for number in (0, *order)
        ]

        def seconds(kernel: Any, bench: Bench = bench) -> float:
            return bench.seconds(kernel, len(bench.weights) + 1)

        times = Server._turns(kernels, seconds, CONFIRM_TURNS)
        content["confirmed"] = {
            json.dumps(points[number], sort_keys=True): ratios(taken, times[0])
            for number, taken in zip((0, *order), times, strict=True)
        }
        (folder / "scan.json").write_text(json.dumps(content))
        for key, ratio in content["confirmed"].items():
            print(f"{name}: {ratio[1]:.3f} ({ratio[0]:.3f}-{ratio[2]:.3f}) {key}", flush=True)


def measure(out: Path, names: list[str]) -> None:
    """Time every point in turns with the default."""
    import tvm

    from amx_tvm.targets import resolve
    from tuning.search import ratios
    from tuning.worker import Bench, Server

    target = resolve("llvm").tvm
    for name in names:
        spec, folder = KERNELS[name], out / name
        points = json.loads((folder / "points.json").read_text())
        bench = Bench(spec, target, space_here(spec).rows)

        def seconds(kernel: Any, bench: Bench = bench) -> float:
            return bench.seconds(kernel, len(bench.weights) + 1)

        default = tvm.runtime.load_module(str(folder / "0000.so"))["f"]
        found = {}
        for number, point in enumerate([points[0], *points[1:], points[0]]):
            control = number == len(points)
            kernel = default
            if number and not control:
                kernel = tvm.runtime.load_module(str(folder / f"{number:04}.so"))["f"]
            times = Server._turns([default, kernel], seconds, TURNS)
            ratio = ratios(times[1], times[0])
            found[CONTROL if control else json.dumps(point, sort_keys=True)] = ratio
            if number in (0, len(points)):
                print(f"{name}: default against itself {ratio[1]:.3f}", flush=True)
        content = {"spec": asdict(spec), "ratios": found}
        (folder / "scan.json").write_text(json.dumps(content))


def report(out: Path) -> None:
    """Print the best points, and how searches on these figures end."""
    for name, spec in KERNELS.items():
        path = out / name / "scan.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        table = content["ratios"]
        control = table.pop(CONTROL)
        table.update(content.get("confirmed", {}))
        space = space_here(spec)
        # A point that was not confirmed was not among the fastest: it cannot be the best.
        ordered = sorted(table, key=lambda key: table[key][1])
        known = content.get("confirmed", table)
        ordered.sort(key=lambda key: key not in known)
        best = table[ordered[0]][1]
        within = sum(table[key][1] <= best / 0.98 for key in table)
        default = json.dumps(dict(space.default), sort_keys=True)
        place = ordered.index(default) + 1
        print(f"{name} {spec.n}x{spec.k}: {len(table)} points, default {best:.3f} of the best's")
        print(f"  speed, place {place}; the control took {control[1]:.3f} of the default's time")
        print(f"  best: {ordered[0]}; {within} points within 2 % of it")
        for share in (20, 10, 5):
            trials = space.size // share
            reached = [speed(table, space, seed, trials, best) for seed in range(SEEDS)]
            chance = [random_speed(table, seed, trials, best) for seed in range(SEEDS)]
            print(
                f"  {trials} trials (1/{share}): search {np.mean(np.array(reached) >= 0.98):.0%} "
                f"of {SEEDS} seeds reach 98 %, median {np.median(reached):.3f}, worst "
                f"{min(reached):.3f}; random order {np.mean(np.array(chance) >= 0.98):.0%}, median "
                f"{np.median(chance):.3f}"
            )


def speed(table: dict[str, Any], space: Any, seed: int, trials: int, best: float) -> float:
    """Return best time / found time after a search over the scan's figures."""
    from tuning.search import Search, point_key

    search = Search(space, seed)
    for _ in range(trials):
        point, against = search.next(), search.incumbent
        there = table[point_key(against)][1]
        search.measured(point, against, tuple(v / there for v in table[point_key(point)]))
    return best / table[point_key(search.incumbent)][1]


def random_speed(table: dict[str, Any], seed: int, trials: int, best: float) -> float:
    """Return the same for points in a random order."""
    chance = np.random.default_rng(seed)
    values = np.array([v[1] for v in table.values()])
    return float(best / values[chance.permutation(len(values))[:trials]].min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("build", "measure", "confirm", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernel", action="append", choices=tuple(KERNELS))
    options = parser.parse_args()
    if options.action == "build":
        build(options.out)
    elif options.action == "measure":
        measure(options.out, options.kernel or list(KERNELS))
    elif options.action == "confirm":
        confirm(options.out, options.kernel or list(KERNELS))
    else:
        report(options.out)


if __name__ == "__main__":
    main()
