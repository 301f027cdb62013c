"""Runs the parts; `benchmarks.serving` says what they are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import serving
from benchmarks.serving.company import arrival, prefix
from benchmarks.serving.described import openapi
from benchmarks.serving.draws import draws
from benchmarks.serving.forms import forms
from benchmarks.serving.judges import judges
from benchmarks.serving.operation import leave, load, queue, rest
from benchmarks.serving.pace import latency, speed
from benchmarks.serving.prompts import Prompts
from benchmarks.serving.same import same
from benchmarks.serving.schemas import schemas
from benchmarks.serving.speculation import speculation

TIMED = (speed, latency, arrival, prefix, forms, speculation, rest, load, leave, queue)
JUDGED = (schemas, openapi, same, draws, judges)
PARTS: dict[str, Callable[[argparse.Namespace, Prompts], Any]] = {
    part.__name__: part for part in (*TIMED, *JUDGED)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(serving.__doc__).split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--idle", type=int, default=20, help="seconds of idleness")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's llama-server, built here")
    parser.add_argument("--gguf", type=Path, help="the same model for it")
    parser.add_argument("--schemas", type=Path, nargs="+", default=[], help="files and folders")
    parser.add_argument("--openapi", type=Path, help="OpenAI's openapi.json or openapi.yaml")
    parser.add_argument(
        "--judges", type=Path, nargs="+", default=[], help="environments' bin folders"
    )
    parser.add_argument("--only", nargs="+", help="these judges")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if (args.llama_server is None) != (args.gguf is None):
        parser.error("--llama-server and --gguf belong together")
    prompts = Prompts(args.artifact)
    parts = args.parts or [part.__name__ for part in TIMED]
    found = {part: PARTS[part](args, prompts) for part in parts}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.plot and "speed" in found:
        _plot(found["speed"], args.plot)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots()
    streams = [row["streams"] for row in rows]
    for name in rows[0]["tokens_per_s"]:
        axes.plot(streams, [row["tokens_per_s"][name] for row in rows], marker="o", label=name)
    axes.set_xlabel("streams")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend()
    plt.savefig(path)


if __name__ == "__main__":
    main()
