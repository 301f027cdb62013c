"""Time, peak memory and disk of compile() for models of a Llama 3 shape with random weights.

    python benchmarks/compile_cost.py DIR [--shape 1b|8b] [--target llvm] [--keep]

The checkpoint (bfloat16, see random_llama.py) is written into DIR first and removed afterwards; the
model is then compiled by a process of its own, whose wall time and largest resident set are
printed, beside the compiler's own processes (the linker). Tuning takes no part in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import random_llama

SHAPES = {
    "1b": random_llama.SHAPE,
    "8b": {
        **random_llama.SHAPE,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
WORKER = """
import sys, amx_tvm
amx_tvm.compile(sys.argv[1], target=sys.argv[2], quantization="amxfp4", output=sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--target", default="llvm")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and artifact")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    place = options.directory / options.shape
    artifact = options.directory / f"{options.shape}-artifact"
    shutil.rmtree(artifact, ignore_errors=True)
    if not place.exists():
        random_llama.write_huggingface(place, random_llama.pool(), shape)
        if not shape["tie_word_embeddings"]:
            add_head(place, shape)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", WORKER, str(place), options.target, str(artifact)],
        check=True,
        env=environment,
    )
    seconds = time.perf_counter() - begin
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    files = [path for path in artifact.rglob("*") if path.is_file()]
    result = {
        "shape": options.shape,
        "target": options.target,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
        "checkpoint_gib": round((place / "model.safetensors").stat().st_size / 2**30, 2),
        "artifact_gib": round(sum(path.stat().st_size for path in files) / 2**30, 2),
    }
    print(json.dumps(result))
    if not options.keep:
        shutil.rmtree(place)
        shutil.rmtree(artifact)


def add_head(place: Path, shape: dict) -> None:
    """Name the head: its values are those of the embedding, the same bytes of the file."""
    path = place / "model.safetensors"
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size)
    header = json.loads(text)
    header["lm_head.weight"] = header["model.embed_tokens.weight"]
    widened = json.dumps(header, separators=(",", ":")).encode()
    if len(widened) > size:
        raise SystemExit("the header has no room for the head's entry")
    with path.open("r+b") as file:
        file.seek(8)
        file.write(widened + b" " * (size - len(widened)))


if __name__ == "__main__":
    main()
