"""Measure a package on the machine with the GPU; needs PyTorch, tvm_ffi and TVM's runtime alone.

    python -m tuning.package_run DIRECTORY [--runtime FOLDER] [--limit SECONDS]

Every candidate is compared with NumPy by itself, so that one that crashes or hangs is known; then
all that are right take turns, and the fastest meets the default once more, in more turns. The
measuring process (package_worker.py) is replaced when a candidate ends it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm.artifact.publication import Publication
from relax_passes.spec import LinearSpec
from tuning.measure import Failure, Measured, Worker

PACKAGE, RESULTS = "package.json", "results.json"
TURNS, FINAL_TURNS = 24, 60
LIMIT = 60.0


class Contest:
    """One task of a package: its candidates, and what is known of each."""

    def __init__(self, worker: Worker, entry: dict[str, Any]):
        self.worker, self.candidates = worker, entry["candidates"]
        self.spec, self.rows = LinearSpec.from_json(entry["spec"]), (int(entry["rows"]),)
        self.results: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Return {"results": one a candidate, "final": the fastest against the default or None}."""
        good = [n for n in range(len(self.candidates)) if self._check(n)]
        final = None
        if 0 in good and (times := self._times(good, TURNS)) is not None:
            for number, taken in zip(good, times, strict=True):
                self.results[number] |= summary(taken, times[0])
            best = min(good, key=lambda n: self.results[n]["ratio"][1])
            if best != 0 and (again := self._times([0, best], FINAL_TURNS)) is not None:
                final = {"candidate": best, **summary(again[1], again[0])}
                final["default_seconds"] = float(np.median(again[0]))
        return {"results": self.results, "final": final}

    def _check(self, number: int) -> bool:
        """Note whether a candidate is right."""
        candidate = self.candidates[number]
        result: dict[str, Any] = {"knobs": candidate["knobs"], "state": "ok"}
        self.results.append(result)
        if candidate["failure"]:
            result |= {"state": "build_failed", "detail": candidate["failure"]}
            return False
        found = self._measure([number], 0)
        if isinstance(found, Failure):
            result |= {"state": found.kind, "detail": found.detail}
            return False
        result["error"], result["limit"] = found.errors[0]
        return True

    def _times(self, numbers: Sequence[int], turns: int) -> list[list[float]] | None:
        """Time candidates in turns; when one ends the process, the task has no times."""
        found = self._measure(numbers, turns)
        if isinstance(found, Measured):
            return found.times
        for number in numbers:
            self.results[number] |= {"state": found.kind, "detail": f"while timed: {found.detail}"}
        return None

    def _measure(self, numbers: Sequence[int], turns: int) -> Measured | Failure:
        contenders = [{"library": self.candidates[n]["library"]} for n in numbers]
        return self.worker.measure(self.spec, self.rows, contenders, turns)


def summary(times: list[float], default: list[float]) -> dict[str, Any]:
    """Return median and quartiles of the seconds and of the ratio to the default."""
    q1, median, q3 = (float(v) for v in np.quantile(times, [0.25, 0.5, 0.75]))
    ratio = np.quantile(np.array(times) / np.array(default), [0.25, 0.5, 0.75])
    return {"seconds": median, "spread": [q1, q3], "ratio": [float(v) for v in ratio]}


def main() -> None:
    """Measure a package and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--runtime", help="folder of TVM's runtime libraries")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one step of a task")
    options = parser.parse_args()
    package = json.loads((options.directory / PACKAGE).read_text())
    command = [sys.executable, "-m", "tuning.package_worker", str(options.directory)]
    command += [options.runtime] if options.runtime else []
    done: dict[str, Any] = {}
    with Worker(package["target"], options.limit, command) as worker:
        for number, entry in enumerate(package["tasks"]):
            start = time.monotonic()
            found = done[str(number)] = Contest(worker, entry).run()
            final = found["final"]
            ratio = f"{final['ratio'][1]:.3f} {final['candidate']}" if final else "default"
            print(
                f"{entry['name']} M <= {entry['rows']}: best {ratio} "
                f"({time.monotonic() - start:.1f} s)",
                flush=True,
            )
            # after every task: a machine that is taken away leaves what was measured
            content = {"gpu": (worker.host or {}).get("gpu", ""), "tasks": done}
            with Publication(options.directory / RESULTS) as new:
                new.path.write_text(json.dumps(content))
                new.publish(replace=True)


if __name__ == "__main__":
    main()
