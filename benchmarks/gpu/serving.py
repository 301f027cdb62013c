"""The server on a GPU: tokens/s over HTTP beside the engine's own batches, in turn.

    python -m benchmarks.gpu.models build --out build/models --model llama-8b
    python -m benchmarks.gpu.serving --out build/models --model llama-8b \
        --tokenizer dist/smollm2/tokenizer.json [--streams 1 16 64 128] [--json serving.json]

The weights are random, the tokenizer is real: tokens beyond it get spellings of their own. Engine,
server and load are a process each; prompts are token ids.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.gpu.models import MODELS, TINY, RandomModel
from benchmarks.serving.contenders import Lines, Load, Served
from benchmarks.serving.prompts import STREAM, WHOLE, asked, gaps, middle


def engine_of(args: argparse.Namespace, directory: Path) -> Any:
    """Return the engine of random weights, with a tokenizer of all its tokens."""
    places = max(args.streams)
    made = RandomModel(args.out, args.model, places, places * (args.prompt + args.tokens + 32))
    engine = made.engine
    engine.manifest.target = SimpleNamespace(device="cuda")
    spelled = json.loads(args.tokenizer.read_text())
    known, size = spelled["model"]["vocab"], int(engine.manifest.model["vocab_size"])
    known |= {f"Ġx{i}": i for i in range(len(known), size)}
    (directory / "tokenizer.json").write_text(json.dumps(spelled))
    engine.path = directory
    return engine


def answer(args: argparse.Namespace, directory: Path) -> None:
    """Run batches as lines on the standard input ask for them."""
    engine = engine_of(args, directory)
    print("ready", flush=True)
    for line in sys.stdin:
        prompts = json.loads(line)
        start = time.perf_counter()
        options: dict[str, Any] = {"max_new_tokens": args.tokens, "ignore_eos": True}
        if len(prompts) == 1:
            engine.generate(prompts[0], **options)
        else:
            engine.generate_batch(prompts, **options)
        print(json.dumps(time.perf_counter() - start), flush=True)


def serve(args: argparse.Namespace, directory: Path) -> None:
    """Serve until told to stop."""
    from amx_tvm.server.address import Address
    from amx_tvm.server.app import Settings
    from amx_tvm.server.run import serve as run

    run(engine_of(args, directory), Settings("random"), Address(port=args.port))


def compare(args: argparse.Namespace, _: Path) -> None:
    """Ask both in turn at each number of streams."""
    random, rows = np.random.default_rng(0), []
    command = [sys.executable, "-m", "benchmarks.gpu.serving", *sys.argv[1:]]
    with (
        Lines([*command, "--part", "answer"]) as engine,
        Served([*command, "--part", "serve"]) as server,
        Load() as load,
    ):
        engine.line()
        vocabulary = int(
            json.loads((args.out / f"{args.model}.json").read_text())["model"]["vocab_size"]
        )
        for streams in args.streams:
            turns: dict[str, list[Any]] = {"engine": [], "server": []}
            for repeat in range(args.repeats + 1):
                ids = random.integers(100, vocabulary, (2, streams, args.prompt)).tolist()
                bodies = [
                    {"prompt": one, "max_tokens": args.tokens, **WHOLE, **STREAM} for one in ids[1]
                ]
                for name in ("engine", "server") if repeat % 2 else ("server", "engine"):
                    used = server.cpu_s()
                    if name == "engine":
                        found: Any = {"seconds": engine.ask(ids[0])}
                    else:
                        found = asked(load, server, bodies)
                    if repeat:
                        turns[name].append(found | {"server_cpu_s": server.cpu_s() - used})
            rows.append(_row(streams, args.tokens, turns))
            print(rows[-1].pop("line"), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def _row(streams: int, tokens: int, turns: dict[str, list[Any]]) -> dict[str, Any]:
    made = streams * tokens
    per_s = {k: [made / one["seconds"] for one in found] for k, found in turns.items()}
    served = turns["server"]
    between = [gap for one in served for answer in one["answers"] for gap in gaps(answer)]
    first = [a["arrivals"][0] for one in served for a in one["answers"]]
    ratios = [a / b for a, b in zip(per_s["server"], per_s["engine"], strict=True)]
    row: dict[str, Any] = {
        "streams": streams,
        "tokens_per_s": {k: float(np.median(v)) for k, v in per_s.items()},
        "ratios": ratios,
        "first_s": float(np.median(first)),
        "between_s": {p: float(np.percentile(between, p)) for p in (50, 95, 99)},
        "server_cpu": float(np.median([one["server_cpu_s"] / one["seconds"] for one in served])),
        "load_cpu": float(np.median([one["cpu_s"] / one["seconds"] for one in served])),
    }
    row["line"] = (
        f"{streams:3d} streams: {row['tokens_per_s']['server']:.0f} of "
        f"{row['tokens_per_s']['engine']:.0f} tokens/s, {middle(ratios)}; first token "
        f"{1000 * row['first_s']:.1f} ms, between {1000 * row['between_s'][50]:.2f}/"
        f"{1000 * row['between_s'][99]:.2f} ms (p50/99); server {100 * row['server_cpu']:.0f} %, "
        f"load {100 * row['load_cpu']:.0f} % of a core"
    )
    return row


PARTS = {"compare": compare, "answer": answer, "serve": serve}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where models were built")
    parser.add_argument("--model", choices=(*MODELS, *TINY), default="llama-8b")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=[*PARTS], default="compare", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=8000, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        PARTS[args.part](args, Path(directory))


if __name__ == "__main__":
    main()
