"""Linears of this project against llama.cpp, ONNX Runtime and torch bf16, interleaved, on one CPU.

    python benchmarks/cpu_kernels.py --threads 2 --shape 4096x4096 --rows 1 128 512

Every repeat runs all contenders in turn, each over several copies of the weights, so that weights
come from memory; ratios are taken repeat by repeat and printed as median and quartiles. On a busy
machine ``--clock cpu --threads 1`` counts the calling thread's own time. Peers that are not
installed are left out and named; ``--peers DIR`` adds another environment's site-packages.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

OURS = "amxfp4:int8-outliers"  # what a model compiled with default options runs
PEER_KINDS = (
    "llama.cpp mxfp4",
    "llama.cpp q4_0",
    "llama.cpp q4_k",
    "onnxruntime int4",
    "torch bf16",
)
BITS = {
    "llama.cpp mxfp4": 4.25,
    "llama.cpp q4_0": 4.5,
    "llama.cpp q4_k": 4.5,
    "onnxruntime int4": 5.0,
    "torch bf16": 16.0,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", nargs="+", default=["4096x4096"], help="N x K, as 4096x4096")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 128, 512])
    parser.add_argument("--format", nargs="+", default=[OURS], help="FORMAT:ACTIVATION")
    parser.add_argument("--peer", nargs="*", default=list(PEER_KINDS))
    parser.add_argument("--peers", help="site-packages of an environment that holds the peers")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--megabytes", type=int, default=200, help="weights a contender cycles through"
    )
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def our_linear(spec_text: str, n: int, k: int, m: int, copies: int) -> tuple[Callable, float]:
    """Compile one of this project's linears; returns (call, bits a weight)."""
    import tvm
    from tvm.target import Target

    from relax_passes.activation import Activation
    from relax_passes.kernels import activations
    from relax_passes.kernels.registry import linear_kernel
    from relax_passes.spec import LinearSpec

    name, _, activation = spec_text.partition(":")
    spec = LinearSpec(name, n, k, Activation.parse(activation or "int8"), m=m)
    cpu = tvm.target.codegen.llvm_get_system_cpu()
    target = Target({"kind": "llvm", "mcpu": cpu, "num-cores": os.cpu_count()})

    def compiled(func: tvm.tirx.PrimFunc) -> Callable:
        module = tvm.IRModule({"f": func.with_attr("global_symbol", "f")})
        return tvm.compile(module, target)["f"]

    kernel = compiled(linear_kernel(spec, target).func)
    rng = np.random.default_rng(0)
    x = tvm.runtime.tensor(rng.standard_normal((m, k)).astype(np.float32))
    inputs = [x]
    if not spec.activation.exact:
        parts = spec.activation_buffers()
        inputs = [tvm.runtime.empty((m, *shape), dtype) for _, shape, dtype in parts]
        scheme = {"scheme": spec.activation, "sums": spec.needs_sums, "prologue": "none"}
        quantize = activations.quantize(m, target, k=k, eps=0.0, **scheme)
        compiled(quantize)(x, *inputs)
    weights = []
    for _ in range(copies):
        shapes = {name: (shape, dtype) for name, shape, dtype in spec.weight_buffers()}
        codes = rng.integers(0, 256, shapes["w_codes"][0], dtype=np.uint8)
        scales = rng.integers(0x28, 0x30, shapes["w_scales"][0], dtype=np.uint8)
        one = [tvm.runtime.tensor(codes), tvm.runtime.tensor(scales)]
        if spec.fmt.row_scaled:
            one.append(tvm.runtime.tensor(np.ones(shapes["tile_scale"][0], np.float32)))
        weights.append(one)
    y = tvm.runtime.empty((m, n), "float32")
    bits = 8 * (codes.nbytes + scales.nbytes) / (n * k)
    return lambda i: kernel(*inputs, *weights[i], y), bits


def read_bandwidth(threads: int, megabytes: int = 400) -> float:
    """Bytes a second that the cores can read, by a kernel that only adds up words."""
    import tvm
    from tvm.target import Target

    from relax_passes.kernels.cpu import emit as e

    rows, width = megabytes * 256, 4096
    with e.function("read", [("w_data", (rows, width // 4), "int32"),
                             ("y", (rows, 16), "int32")], 1) as (b, _):  # fmt: skip
        with e.parallel(0, rows // 256) as block, e.serial(0, 256) as i:
            row = e.let(block * 256 + i)
            sums = [e.Register("int32", 16, e.const(0, "int32", 16)) for _ in range(4)]
            with e.serial(0, width // 256) as j:
                for s, register in enumerate(sums):
                    e.prefetch(b["w_data"], row, j * 64 + s * 16 + 1024)
                    value = e.load(b["w_data"], row, j * 64 + s * 16, lanes=16)
                    register.set(register.get() + value)
            total = sums[0].get() + sums[1].get() + sums[2].get() + sums[3].get()
            e.store(b["y"], total, block, 0, lanes=16)
    target = Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    func = tvm.compile(tvm.IRModule({"f": b["func"].with_attr("global_symbol", "f")}), target)["f"]
    data = tvm.runtime.tensor(np.ones((rows, width // 4), np.int32))
    y = tvm.runtime.tensor(np.zeros((rows, 16), np.int32))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        func(data, y)
        times.append(time.perf_counter() - start)
    return rows * width / float(np.median(times))


def contenders(
    args: argparse.Namespace, n: int, k: int, m: int
) -> tuple[dict[str, tuple[Callable, float, int]], dict[str, str]]:
    """Build everything that can be built: {name: (call, bits, copies)} and what is missing."""
    import cpu_peers

    def copies(bits: float) -> int:
        return max(2, int(args.megabytes * 1e6 / (n * k * bits / 8))) if m < 16 else 2

    made, missing = {}, {}
    for text in args.format:
        count = copies(4.5)
        call, bits = our_linear(text, n, k, m, count)
        made[text] = (call, bits, count)
    for name in args.peer:
        count, common = copies(BITS[name]), (n, k, m, args.threads)
        try:
            if name.startswith("llama.cpp"):
                call = cpu_peers.ggml_linear(*common, count, name.split()[1])
            elif name.startswith("onnx"):
                call = cpu_peers.onnx_linear(*common, count)
            else:
                call = cpu_peers.torch_linear(*common, count)
            call(0)
            made[name] = (call, BITS[name], count)
        except (ImportError, OSError) as error:
            missing[name] = str(error)
    return made, missing


def measure(
    made: dict[str, tuple[Callable, float, int]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds a call, one median over the copies for each repeat, contenders interleaved."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, (call, _, count) in made.items():
            taken = []
            for i in range(count):
                start = clock()
                call(i)
                taken.append(clock() - start)
            if repeat:
                times[name].append(float(np.median(taken)))
    return times


def report(n: int, k: int, m: int, made: dict, times: dict, ours: str) -> list[dict]:
    rows = []
    for name, values in times.items():
        seconds = float(np.median(values))
        ratio = np.quantile(np.array(values) / np.array(times[ours]), [0.25, 0.5, 0.75])
        row = {
            "n": n, "k": k, "m": m, "kernel": name, "us": seconds * 1e6,
            "gop_s": 2 * n * k * m / seconds / 1e9,
            "gb_s": n * k * made[name][1] / 8 / seconds / 1e9,
            "ratio": [float(r) for r in ratio],
        }  # fmt: skip
        rows.append(row)
        low, middle, high = ratio
        print(
            f"{n}x{k} M={m:<4} {name:18} {row['us']:10.0f} us {row['gop_s']:7.0f} GOP/s "
            f"{row['gb_s']:6.1f} GB/s   {ours}: {middle:.2f} ({low:.2f}-{high:.2f}) times as fast",
            flush=True,
        )
    return rows


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((r["n"], r["k"], r["m"]) for r in rows))
    names = list(dict.fromkeys(r["kernel"] for r in rows))
    _, axis = plt.subplots(figsize=(2 + 2 * len(cases), 4))
    width = 0.8 / len(names)
    for j, name in enumerate(names):
        found = {(r["n"], r["k"], r["m"]): r["gop_s"] for r in rows if r["kernel"] == name}
        heights = [found.get(c, 0) for c in cases]
        axis.bar([i + j * width for i in range(len(cases))], heights, width, label=name)
    axis.set_xticks(range(len(cases)), [f"{n}x{k}\nM={m}" for n, k, m in cases])
    axis.set_ylabel("GOP/s")
    axis.set_yscale("log")
    axis.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(path, dpi=120)


def main() -> None:
    args = arguments()
    os.environ["TVM_NUM_THREADS"] = str(args.threads)
    sys.path.insert(0, str(Path(__file__).parent))
    if args.peers:
        sys.path.append(args.peers)
    if args.clock == "cpu" and args.threads != 1:
        raise SystemExit("--clock cpu counts one thread; use --threads 1 with it")
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    bandwidth = read_bandwidth(args.threads)
    print(f"reads: {bandwidth / 1e9:.1f} GB/s on {args.threads} thread(s)")
    rows: list[dict] = []
    for shape in args.shape:
        n, k = (int(v) for v in shape.split("x"))
        for m in args.rows:
            made, missing = contenders(args, n, k, m)
            for name, why in missing.items():
                print(f"left out: {name} ({why})")
            rows += report(n, k, m, made, measure(made, args.repeats, clock), args.format[0])
    if args.json:
        result = {
            "threads": args.threads,
            "clock": args.clock,
            "read_gb_s": bandwidth / 1e9,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
