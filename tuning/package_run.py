"""Measure a package on the machine with the GPU; needs PyTorch, tvm_ffi and TVM's runtime alone.

    python -m tuning.package_run DIRECTORY [--runtime FOLDER] [--limit SECONDS]

Candidates of a task take turns. In a turn each replays a CUDA graph that launches its kernel once
for every copy of the weights, more than 256 MB together, so that they come from device memory and
not from the L2 cache. Results are compared with NumPy's before anything is timed. At the end the
fastest meets the default once more, in more turns.

All of it runs in a child process. A kernel that crashes takes the child's CUDA context along, one
that hangs is ended with it: that candidate is noted, and another child goes on without it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from relax_passes.spec import LinearSpec

PACKAGE, RESULTS = "package.json", "results.json"
COPIES_BYTES = 256 << 20
TURNS, FINAL_TURNS = 24, 60
WARM_SECONDS = 0.05
LIMIT = 60.0


def load_runtime(folder: str | None) -> None:
    """Load TVM's runtime and its CUDA part from a folder, or as an installed amx_tvm does."""
    if folder is None:
        from amx_tvm.runtime.library import load_runtime as load

        load("cuda")
        return
    import tvm_ffi  # noqa: F401 - its library comes first

    for name in ("libtvm_runtime.so", "libtvm_runtime_cuda.so"):
        ctypes.CDLL(str(Path(folder) / name), ctypes.RTLD_GLOBAL)


class Task:
    """One task's operands and answer on the GPU, and the graphs of its candidates."""

    def __init__(self, entry: dict[str, Any], folder: Path):
        import torch

        from tuning.oracle import FragmentOperands

        self.torch, self.entry, self.folder = torch, entry, folder
        self.spec, self.rows = LinearSpec(**entry["spec"]), int(entry["rows"])
        self.operands = FragmentOperands(self.spec)
        before, behind, self.answer = self.operands.arguments(self.rows)
        self.before, self.behind = self._sent(before), self._sent(behind)
        weights = self._sent(self.operands.weights)
        size = sum(w.numel() * w.element_size() for w in weights)
        copies = max(4, -(-COPIES_BYTES // size))
        self.weights = [[w.clone() for w in weights] for _ in range(copies)]
        self.y = torch.empty(self.answer.shape, dtype=torch.float16, device="cuda")

    def _sent(self, arrays: list[np.ndarray]) -> list[Any]:
        return [self.torch.from_numpy(a).cuda() for a in arrays]

    def load(self, number: int) -> Any:
        """Return a candidate's function."""
        import tvm_ffi

        library = self.folder / self.entry["candidates"][number]["library"]
        return tvm_ffi.load_module(str(library.resolve()))["f"]

    def error(self, function: Any) -> float:
        """Return the norm of the deviation from NumPy's result over the result's."""
        self.y.fill_(float("nan"))
        function(*self.before, *self.weights[0], *self.behind, self.y)
        self.torch.cuda.synchronize()
        off = self.y.cpu().numpy().astype(np.float64) - self.answer
        return float(np.linalg.norm(off) / np.linalg.norm(self.answer))

    def graph(self, function: Any) -> Any:
        """Capture one launch for every copy of the weights."""
        import tvm_ffi

        graph = self.torch.cuda.CUDAGraph()
        with tvm_ffi.use_torch_stream(self.torch.cuda.graph(graph)):
            for weights in self.weights:
                function(*self.before, *weights, *self.behind, self.y)
        return graph

    def replay(self, graph: Any) -> float:
        """Return the seconds of one launch, over one replay."""
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / len(self.weights)

    def turns(self, graphs: dict[int, Any], turns: int) -> dict[int, list[float]]:
        """Time graphs in turns, each turn in an order of its own."""
        first = next(iter(graphs.values()))
        start = time.perf_counter()
        while time.perf_counter() - start < WARM_SECONDS:
            self.replay(first)
        times: dict[int, list[float]] = {number: [] for number in graphs}
        order = list(graphs)
        for turn in range(turns + 1):
            random.Random(turn).shuffle(order)
            for number in order:
                seconds = self.replay(graphs[number])
                if turn:
                    times[number].append(seconds)
        return times


def measure(entry: dict[str, Any], folder: Path, skip: dict[int, str], tell: Any) -> dict[str, Any]:
    """Check and time all candidates of a task.

    Parameters
    ----------
    entry : dict
        The task as the package describes it.
    folder : path
        The package.
    skip : dict
        Candidates that ended a child before -> what they did.
    tell : callable
        Called with a candidate's number before it runs, so that the parent knows who was it.
    """
    from tuning.oracle import FRAGMENT_LIMIT

    task = Task(entry, folder)
    results: list[dict[str, Any]] = []
    graphs = {}
    for number, candidate in enumerate(entry["candidates"]):
        result: dict[str, Any] = {"knobs": candidate["knobs"], "state": "ok"}
        results.append(result)
        if candidate["failure"]:
            result |= {"state": "build_failed", "detail": candidate["failure"]}
        elif number in skip:
            result |= {"state": skip[number], "detail": "it ended the measuring process"}
        else:
            tell(number)
            try:
                function = task.load(number)
                off = task.error(function)
                result |= {"error": off, "limit": FRAGMENT_LIMIT}
                if off <= FRAGMENT_LIMIT:
                    graphs[number] = task.graph(function)
                    task.replay(graphs[number])
                else:
                    result |= {"state": "wrong", "detail": f"differs from NumPy by {off:.2e}"}
            except RuntimeError as error:
                if "illegal" in str(error) or "unspecified" in str(error):
                    raise  # this process's CUDA context is gone
                result |= {"state": "build_failed", "detail": str(error)[-300:]}
    if 0 not in graphs:
        return {"results": results, "final": None}
    tell(-1)
    times = task.turns(graphs, TURNS)
    for number, taken in times.items():
        results[number] |= summary(taken, times[0])
    best = min(graphs, key=lambda number: results[number]["ratio"][1])
    final = None
    if best != 0:
        again = task.turns({0: graphs[0], best: graphs[best]}, FINAL_TURNS)
        final = {"candidate": best, **summary(again[best], again[0])}
        final["default_seconds"] = float(np.median(again[0]))
    return {"results": results, "final": final}


def summary(times: list[float], default: list[float]) -> dict[str, Any]:
    """Return median and quartiles of the seconds and of the ratio to the default."""
    q1, median, q3 = (float(v) for v in np.quantile(times, [0.25, 0.5, 0.75]))
    ratio = np.quantile(np.array(times) / np.array(default), [0.25, 0.5, 0.75])
    return {"seconds": median, "spread": [q1, q3], "ratio": [float(v) for v in ratio]}


def child(folder: Path, runtime: str | None) -> None:
    """Measure the tasks that standard input names, one JSON line each."""
    import torch  # first: it brings the CUDA runtime library that TVM's needs

    load_runtime(runtime)
    entries = json.loads((folder / PACKAGE).read_text())["tasks"]

    def say(**message: Any) -> None:
        print(json.dumps(message), flush=True)

    say(gpu=torch.cuda.get_device_name())
    for line in sys.stdin:
        request = json.loads(line)
        skip = {int(k): v for k, v in request["skip"].items()}
        entry = entries[request["task"]]
        found = measure(entry, folder, skip, lambda number: say(trying=number))
        say(done=found)
        torch.cuda.empty_cache()


class Child:
    """The measuring process, replaced when a candidate ends it."""

    def __init__(self, folder: Path, runtime: str | None):
        command = [sys.executable, "-m", "tuning.package_run", str(folder), "--child"]
        command += ["--runtime", runtime] if runtime else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.buffer = b""
        hello = self.read(300)
        if hello is None:
            raise SystemExit("the measuring process does not start; see its message above")
        self.gpu = str(hello["gpu"])

    def read(self, limit: float) -> dict[str, Any] | None:
        """Return the next message; None when the process died, or said nothing for too long."""
        assert self.process.stdout is not None
        end = time.monotonic() + limit
        while b"\n" not in self.buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                return None
            part = self.process.stdout.read(1 << 16)
            if not part:
                return None
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def ask(self, task: int, skip: dict[int, str], limit: float) -> tuple[Any, int]:
        """Return (a task's results or None, the candidate that ran last)."""
        assert self.process.stdin is not None
        trying = -1
        self.process.stdin.write(json.dumps({"task": task, "skip": skip}).encode() + b"\n")
        while (message := self.read(limit)) is not None:
            if "done" in message:
                return message["done"], trying
            trying = message["trying"]
        return None, trying


def main() -> None:
    """Measure a package and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--runtime", help="folder of TVM's runtime libraries")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one step of a task")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.directory, options.runtime)
        return
    entries = json.loads((options.directory / PACKAGE).read_text())["tasks"]
    worker = Child(options.directory, options.runtime)
    done: dict[int, Any] = {}
    for task, entry in enumerate(entries):
        skip: dict[int, str] = {}
        while task not in done:
            start = time.monotonic()
            found, last = worker.ask(task, skip, options.limit)
            if found is not None:
                done[task] = found
                break
            kind = "crashed" if worker.process.poll() is not None else "hung"
            worker.process.kill()
            worker.process.wait()
            if last <= 0 or last in skip:  # the default, or nobody in particular
                done[task] = {"results": [], "final": None, "failure": kind}
            skip[last] = kind
            worker = Child(options.directory, options.runtime)
        final = done[task]["final"]
        ratio = f"{final['ratio'][1]:.3f} {final['candidate']}" if final else "default"
        print(
            f"{entry['name']} {entry['kernel']['bucket']}: best {ratio} "
            f"({time.monotonic() - start:.1f} s)",
            flush=True,
        )
        # after every task: a machine that is taken away leaves what was measured
        content = {"gpu": worker.gpu, "tasks": {str(k): v for k, v in done.items()}}
        (options.directory / RESULTS).write_text(json.dumps(content))
    worker.process.kill()


if __name__ == "__main__":
    main()
