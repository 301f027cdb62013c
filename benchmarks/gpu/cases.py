"""Numeric cases for every format and epilogue: made on one machine, run on the one with the GPU.

    python -m benchmarks.gpu.cases build --out build/cases --arch sm_90a
    python -m benchmarks.gpu.cases run --out build/cases [--runtime FOLDER]

A case is a library with the default buckets (so every schedule runs), packed weights, x, and the
result in float64 from the format's own dequantization. It is run for numbers of rows on both sides
of every bucket's edge.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from amx_tvm.formats import Format, Quantized

ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 100, 128, 129, 300, 520)
TOLERANCE = 1.5e-3


@dataclass(frozen=True)
class Case:
    """A linear to compute; sizes include ragged ones."""

    format: str
    n: int
    k: int
    bias: bool = False
    residual: bool = False
    silu_mul: bool = False
    dependent: bool = False
    scaled_weights: bool = False  # at every M of the decode schedule, not above 8 rows alone

    @property
    def key(self) -> str:
        flags = "".join(
            c
            for c, on in zip(
                "brspw",
                (self.bias, self.residual, self.silu_mul, self.dependent, self.scaled_weights),
                strict=True,
            )
            if on
        )
        return f"{self.format}-{self.n}x{self.k}-{flags or 'plain'}"


CASES = (
    Case("amxfp4", 256, 1024, bias=True, residual=True),
    Case("amxfp4", 208, 576),
    Case("amxfp4", 512, 2048, silu_mul=True),
    Case("amxfp4", 512, 4096, residual=True, dependent=True),
    Case("amxfp4", 70, 136),
    Case("amxfp4-e4m3", 256, 1024),
    Case("amxfp4-e4m3-tensor", 256, 1024, bias=True),
    Case("amxfp4-pot", 256, 1024),
    Case("mxfp4", 256, 1024, residual=True),
    Case("nvfp4", 192, 1088),
    Case("int4", 256, 1024, bias=True),
    Case("int8", 256, 1056),
    Case("none", 256, 1040, residual=True),
    # so many rows of W take other blocks
    Case("amxfp4", 17024, 512, silu_mul=True, bias=True),
    Case("nvfp4", 17024, 512, residual=True, dependent=True),
    Case("amxfp4", 208, 576, scaled_weights=True),
    Case("amxfp4", 512, 4096, silu_mul=True, dependent=True, scaled_weights=True),
    Case("nvfp4", 192, 1088, residual=True, scaled_weights=True),
    Case("int4", 256, 1024, bias=True, scaled_weights=True),
)
# linears that multiply E4M3 from some number of rows on (W4A8); sm_90a
E4M3_CASES = (
    Case("amxfp4", 256, 1024, bias=True, residual=True),
    Case("amxfp4", 208, 576, dependent=True),
    Case("amxfp4", 17024, 512, silu_mul=True),
    Case("amxfp4", 512, 14336, residual=True),
    Case("mxfp4", 256, 1024),
    Case("nvfp4", 192, 1088, bias=True),
    Case("amxfp4-e4m3", 256, 1024),
    Case("amxfp4-e4m3-tensor", 256, 1024),
)
E4M3_TOLERANCE = 4e-3  # the tensor cores keep 14 bits of a sum
# linears whose input a row kernel rounds to their own format before (W4A4)
W4A4_CASES = (
    Case("amxfp4", 208, 576),
    Case("mxfp4", 256, 576),
    Case("nvfp4", 256, 576),
    Case("amxfp4-e4m3-tensor", 256, 576),
)


def quantize_tiles(fmt: Format, weight: np.ndarray) -> Quantized:
    """Quantize; in formats with a tensor scale, tiles of 16 rows have different ones."""
    from amx_tvm import formats

    if not fmt.row_scaled:
        return fmt.quantize(weight)
    starts = range(0, len(weight), 16)
    return formats.concatenate(
        [fmt.quantize(weight[i : i + 16] * np.float32(1 + i // 16 % 5)) for i in starts]
    )


def weights(case: Case, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Packed weights of a case, and what they stand for: float64 [n, k]."""
    from amx_tvm import formats
    from amx_tvm.formats import cuda_layout

    weight = (rng.standard_normal((case.n, case.k)) * 0.05).astype(np.float32)
    if case.format == "none":
        return cuda_layout.pack_float16(weight), weight.astype(np.float16).astype(np.float64)
    fmt = formats.get(case.format)
    quantized = quantize_tiles(fmt, weight)
    return cuda_layout.pack(fmt, quantized), fmt.dequantize(quantized).astype(np.float64)


def reference(case: Case, seed: int) -> dict[str, np.ndarray]:
    """Inputs, packed weights and the exact result of a case."""
    rng = np.random.default_rng(seed)
    packed, dense = weights(case, rng)
    x = rng.standard_normal((max(ROWS), case.k)).astype(np.float16)
    y = x.astype(np.float64) @ dense.T
    arrays = {"x": x, **packed}
    if case.bias:
        arrays["bias"] = rng.standard_normal(case.n).astype(np.float32)
    if case.residual:
        arrays["residual"] = rng.standard_normal(y.shape).astype(np.float16)
    arrays["expected"] = finished(case, y, arrays)
    return arrays


def e4m3_arrays(case: Case, seed: int) -> dict[str, np.ndarray]:
    """Inputs and packed weights of a case in E4M3; "exact" and "decoded" are the two W [n, k]."""
    from amx_tvm import formats
    from amx_tvm.formats import e4m3, packing

    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((case.n, case.k)) * 0.05).astype(np.float32)
    quantized = quantize_tiles(formats.get(case.format), weight)
    arrays = packing.pack(case.format, quantized, e4m3.LAYOUT)
    x = rng.standard_normal((max(ROWS), case.k)) * rng.choice([0.01, 1, 8], (max(ROWS), 1))
    arrays |= {"x": x.astype(np.float16)}
    arrays |= {"exact": quantized.format.dequantize(quantized).astype(np.float64)}
    arrays |= {"decoded": e4m3.decoded(quantized).astype(np.float64)}
    if case.bias:
        arrays["bias"] = rng.standard_normal(case.n).astype(np.float32)
    if case.residual:
        arrays["residual"] = rng.standard_normal((len(x), case.n)).astype(np.float16)
    return arrays


def finished(case: Case, y: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Epilogue of a case in float64."""
    if case.bias:
        y = y + arrays["bias"]
    if case.silu_mul:
        tiles = y.reshape(len(y), -1, 2, 16)
        gate, up = (tiles[:, :, i].reshape(len(y), -1) for i in range(2))
        y = gate / (1 + np.exp(-gate)) * up
    return y + arrays["residual"][: len(y)] if case.residual else y


def build_function(case: Case, arch: str, e4m3: bool = False):  # noqa: ANN201
    """The PrimFunc of a case with the default buckets."""
    from amx_tvm.formats.cuda_layout import shape_of
    from amx_tvm.targets.cuda.gpus import gpu
    from relax_passes.activation import E4M3, FLOAT16
    from relax_passes.kernels.cuda.linear import function
    from relax_passes.kernels.cuda.linear.buckets import default_buckets
    from relax_passes.kernels.cuda.linear.buffers import format_of
    from relax_passes.kernels.cuda.linear.gemv import GemvKnobs
    from relax_passes.spec import LinearSpec

    spec = LinearSpec(
        case.format,
        case.n,
        case.k,
        E4M3 if e4m3 else FLOAT16,
        bias=case.bias,
        residual=case.residual,
        silu_mul=case.silu_mul,
        out_dtype="float16",
    )
    buckets = None
    if case.scaled_weights:
        buckets = [
            replace(b, knobs=replace(b.knobs, scaled_weights=True))
            if isinstance(b.knobs, GemvKnobs)
            else b
            for b in default_buckets(spec, shape_of(format_of(spec)), gpu(arch))
        ]
    return function.build(spec, gpu(arch), buckets, dependent=case.dependent)


def build(out: Path, arch: str) -> None:
    """Write library and data of every case."""
    import tvm

    from amx_tvm.targets import resolve
    from amx_tvm.targets.cuda.gpus import gpu

    target = resolve(f"cuda:{arch}").tvm
    out.mkdir(parents=True, exist_ok=True)
    for seed, case in enumerate(CASES):
        case = replace(case, dependent=case.dependent and gpu(arch).clusters)
        module = tvm.IRModule({"main": build_function(case, arch)})
        tvm.compile(module, target=target).export_library(str(out / f"{case.key}.so"))
        np.savez(out / f"{case.key}.npz", **reference(case, seed))
    (out / "cases.json").write_text(json.dumps([c.key for c in CASES]))


ORDER = ("codes", "scales", "tile_scale", "bias", "residual")


def run_case(function, arrays: dict[str, np.ndarray]) -> dict[int, float]:
    """Relative error by number of rows, on the GPU that is here."""
    import torch

    device = {k: torch.from_numpy(v).cuda() for k, v in arrays.items() if k != "expected"}
    errors = {}
    for rows in ROWS:
        args = [device["x"][:rows].contiguous()]
        for name in ORDER:
            if name in device:
                args.append(
                    device[name][:rows].contiguous() if name == "residual" else device[name]
                )
        expected = arrays["expected"][:rows]
        y = torch.full(expected.shape, float("nan"), dtype=torch.float16, device="cuda")
        function(*args, y)
        torch.cuda.synchronize()
        difference = y.cpu().numpy().astype(np.float64) - expected
        errors[rows] = float(np.linalg.norm(difference) / np.linalg.norm(expected))
    return errors


def run(out: Path, runtime: str | None) -> int:
    """Run all cases; returns the number of wrong results."""
    from . import harness

    harness.load_runtime(runtime)
    wrong = 0
    for key in json.loads((out / "cases.json").read_text()):
        with np.load(out / f"{key}.npz") as data:
            arrays = dict(data)
        try:
            errors = run_case(harness.load_function(out / f"{key}.so"), arrays)
        except Exception as error:
            print(f"{key}: FAILED {str(error)[-300:]}")
            wrong += 1
            continue
        bad = {r: e for r, e in errors.items() if not e < TOLERANCE}
        wrong += len(bad)
        print(f"{key}: worst {max(errors.values()):.1e}" + (f" WRONG {bad}" if bad else ""))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("build", "run"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--runtime")
    args = parser.parse_args()
    if args.action == "build":
        build(args.out, args.arch)
    else:
        raise SystemExit(1 if run(args.out, args.runtime) else 0)


if __name__ == "__main__":
    main()
