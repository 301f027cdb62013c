"""The C++ runner against the Python runtime of the same bundle: speed, first token, memory, size.

    amx-tvm export dist/smollm2 --target llvm --python 3.11 -o dist/here
    python benchmarks/runner_speed.py dist/here

Each repeat starts both programs once for every number of threads, in turns, and they must write
the same text. Decode speed is what each reports of itself, tokens after the first over the time
they took. The first character is timed from the start of the process, checksums and loading
included. Ratios are taken within a repeat; medians and quartiles are shown.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

PROGRAMS = ("runner", "python")
_REPORT = re.compile(
    r"load (?P<load>[\d.]+) s, first token (?P<first>[\d.]+) s, "
    r"(?P<speed>[\d.]+) tokens/s, peak memory (?P<memory>\d+) MB"
)


def run(bundle: Path, program: str, threads: int, tokens: int, prompt: str) -> dict[str, Any]:
    """Generate once; return what the program reported, and the seconds to its first character."""
    start_of = {
        "runner": [bundle / "bin" / "amx-run", bundle],
        "python": [sys.executable, bundle / "generate.py"],
    }
    options = [prompt, "-n", str(tokens), "--threads", str(threads), "--ignore-eos", "--print-ids"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*start_of[program], *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    head = process.stdout.read(1)
    waited = time.perf_counter() - began
    out, err = process.communicate()
    found = _REPORT.search(err.decode())
    if process.returncode or found is None:
        raise SystemExit(f"{program} failed: {err.decode()}")
    numbers = {name: float(text) for name, text in found.groupdict().items()}
    return {**numbers, "waited": waited, "text": (head + out).decode()}


def folder_bytes(*places: Path) -> int:
    return sum(f.stat().st_size for p in places for f in p.rglob("*") if f.is_file())


def sizes(bundle: Path) -> dict[str, int]:
    """Return the bytes of what each program needs besides the model."""
    runtime = bundle / "runtime"
    libraries = [runtime / "tvm" / "lib", runtime / "tvm_ffi" / "lib" / "libtvm_ffi.so"]
    shared = sum(p.stat().st_size if p.is_file() else folder_bytes(p) for p in libraries)
    return {"runner": shared + folder_bytes(bundle / "bin"), "python": folder_bytes(runtime)}


def spread(values: list[float], digits: int = 2) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def measure(bundle: Path, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in PROGRAMS}
    for repeat in range(arguments.repeats):
        for name in PROGRAMS if repeat % 2 else PROGRAMS[::-1]:
            runs[name].append(run(bundle, name, threads, arguments.tokens, arguments.prompt))
    texts = {one["text"] for several in runs.values() for one in several}
    if len(texts) != 1:
        raise SystemExit(f"the texts differ: {sorted(texts)}")
    pairs = zip(runs["runner"], runs["python"], strict=True)
    ratios = [a["speed"] / b["speed"] for a, b in pairs]
    print(f"{threads} thread{'s' * (threads > 1)}: runner / Python {spread(ratios, 3)}")
    for name in PROGRAMS:
        columns = {key: [one[key] for one in runs[name]] for key in ("speed", "waited", "memory")}
        print(
            f"  {name:6}  {spread(columns['speed'], 1)} tokens/s, first character after "
            f"{spread(columns['waited'])} s, peak memory {np.median(columns['memory']):.0f} MB"
        )
    plain = {
        name: [{key: value for key, value in one.items() if key != "text"} for one in several]
        for name, several in runs.items()
    }
    return {"threads": threads, "ratio": float(np.median(ratios)), "runs": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="exported for this machine, with both runtimes")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--json", type=Path, help="write all measurements")
    arguments = parser.parse_args()
    bundle = arguments.bundle.resolve()
    for name, size in sizes(bundle).items():
        print(f"{name}: {size / 1e6:.1f} MB beside the model")
    results = [measure(bundle, threads, arguments) for threads in arguments.threads]
    if arguments.json:
        arguments.json.write_text(json.dumps({"sizes": sizes(bundle), "runs": results}, indent=1))


if __name__ == "__main__":
    main()
