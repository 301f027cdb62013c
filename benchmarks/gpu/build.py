"""Compile the kernels of a benchmark run to libraries that hold machine code; needs no GPU.

    python -m benchmarks.gpu.build --out build/gpu --arch sm_90a      the default kernels
    python -m benchmarks.gpu.build --out build/gpu --sweep FILE       "shape rows knobs" a line

Writes one library a variant and manifest.json, which benchmarks.gpu.linears reads on the machine
with the GPU (another one, if need be: nothing is compiled there).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import asdict
from pathlib import Path

from .shapes import ROWS, SHAPES, Variant


def parse_knobs(text: str, arch: str):  # noqa: ANN201
    """Turn a knob text (see Variant) into (schedule knobs or None for the defaults, dependent)."""
    from amx_tvm.targets.cuda.gpus import gpu
    from relax_passes.kernels.cuda.linear.gemv import GemvKnobs
    from relax_passes.kernels.cuda.linear.tile import TileKnobs

    dependent = text.endswith("p")
    kind, _, numbers = text.removesuffix("p").partition(":")
    if kind == "default":
        return None, dependent
    values = [int(v) for v in numbers.split(",")]
    if kind == "gemv":
        scaled = len(values) > 5 and bool(values.pop())
        return GemvKnobs(*values, scaled_weights=scaled), dependent
    wgmma = gpu(arch).wgmma and kind != "mma"
    roles = {"producer": kind in ("tilep", "walk"), "persistent": kind == "walk"}
    return TileKnobs(*values, **roles, wgmma=wgmma), dependent


def build_variant(variant: Variant, arch: str, out: Path) -> dict:
    """Compile one variant; returns its manifest entry."""
    import tvm

    from amx_tvm.targets import resolve
    from amx_tvm.targets.cuda.gpus import gpu
    from relax_passes.activation import FLOAT16
    from relax_passes.kernels.cuda.linear import function
    from relax_passes.kernels.cuda.linear.buckets import Bucket
    from relax_passes.spec import LinearSpec

    target = resolve(f"cuda:{arch}").tvm
    n, k, _ = SHAPES[variant.shape]
    spec = LinearSpec(variant.format, n, k, FLOAT16, out_dtype="float16")
    knobs, dependent = parse_knobs(variant.knobs, arch)
    if knobs is None:
        buckets = None
    else:
        buckets = [Bucket(variant.rows, knobs)]
    func = function.build(spec, gpu(arch), buckets, dependent=dependent)
    built = tvm.compile(tvm.IRModule({"main": func}), target=target)
    path = out / f"{variant.key}.so"
    built.export_library(str(path))
    return {**asdict(variant), "n": n, "k": k, "library": path.name, "arch": arch}


def _job(args):  # noqa: ANN001, ANN202
    variants, arch, out = args
    try:
        entry = build_variant(variants[0], arch, out)
        return [{**entry, "rows": variant.rows} for variant in variants]
    except Exception as error:  # one bad knob must not lose the others
        return [{**asdict(variants[0]), "error": str(error)[-2000:]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--sweep", type=Path, help='lines of "shape rows knobs [format]"')
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.sweep:
        lines = [x.split("#")[0].split() for x in args.sweep.read_text().splitlines()]
        variants = [Variant(x[0], int(x[1]), *x[2:]) for x in lines if x]
    else:
        variants = [Variant(shape, rows) for shape in SHAPES for rows in ROWS]
    libraries: dict[str, list[Variant]] = {}
    for variant in dict.fromkeys(variants):
        libraries.setdefault(variant.key, []).append(variant)
    jobs = [(same, args.arch, args.out) for same in libraries.values()]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        entries = [entry for found in pool.imap(_job, jobs) for entry in found]
    (args.out / "manifest.json").write_text(json.dumps(entries, indent=1))
    failed = [e for e in entries if "error" in e]
    for entry in failed:
        print(f"{entry['shape']} m={entry['rows']} {entry['knobs']}: {entry['error'][-400:]}")
    print(f"{len(entries) - len(failed)} libraries in {args.out}, {len(failed)} refused")


if __name__ == "__main__":
    main()
