"""Cycles of the linears' inner loops on Arm cores by llvm-mca, beside llama.cpp's of the same kind.

    python benchmarks/arm_cycles.py                       # this compiler's loops
    python benchmarks/arm_cycles.py --peer repack.s       # and those of a file of assembly

A loop's cycles are told for 16 x 32 weights and one row of x: products of two terms count once.
llama.cpp's file is ``ggml-cpu/arch/arm/repack.cpp`` compiled by ``aarch64-linux-gnu-g++ -O3 -S
-mcpu=CORE``. Its loops for MXFP4 do the same work, E2M1 codes in groups of 32; those for IQ4_NL
look codes up too, those for Q4_0 do not: their codes are the numbers. A model of the core's ports,
no measurement: caches are hit, branches foreseen.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import tvm
from tvm.target import Target

from relax_passes.activation import INT8
from relax_passes.kernels.registry import linear_kernel
from relax_passes.spec import LinearSpec

CORES = ("cortex-a76", "neoverse-v1", "apple-m1")
PRODUCTS = {"sdot": 16, "smmla": 32}  # of bytes, an instruction
WEIGHTS = 16 * 32
ITERATIONS = 50
LEAST = 128  # products of a loop that is shown
BRANCH = re.compile(r"\s*(?:b\.?[a-z]{2}|cbn?z|tbn?z)\s+(?:.*,\s*)?([.\w]+)\s*$")


def loops(lines: list[str]) -> Iterator[list[str]]:
    """Yield the bodies of loops that contain no other."""
    labels: dict[str, list[int]] = {}
    for i, line in enumerate(lines):
        if found := re.match(r"\s*([.\w]+):", line):
            labels.setdefault(found[1], []).append(i)

    def back(i: int) -> int | None:
        found = BRANCH.match(lines[i])
        name = found[1] if found else ""
        name = name[:-1] if re.fullmatch(r"\d+b", name) else name
        return max((at for at in labels.get(name, []) if at < i), default=None)

    starts = {i: start for i in range(len(lines)) if (start := back(i)) is not None}
    for end, start in starts.items():
        if not any(start < inner <= i < end for i, inner in starts.items()):
            yield lines[start:end]


def products(body: list[str]) -> int:
    """Count the products of bytes."""
    return sum(count for line in body for name, count in PRODUCTS.items() if name in line)


def cycles(body: list[str], core: str, tool: str) -> float:
    """Return the cycles of one iteration."""
    # llvm-mca leaves out what ".inst" encodes; llama.cpp names the instruction behind it.
    named = [re.sub(r"\s*\.inst\s+\w+\s*//", "", x) for x in body]
    text = "\n".join(x for x in named if not re.match(r"\s*([.#/]|[.\w]+:)", x))
    command = [tool, "-mtriple=aarch64", f"-mcpu={core}", f"-iterations={ITERATIONS}"]
    done = subprocess.run(
        [*command, "-mattr=+dotprod,+i8mm"], input=text, capture_output=True, text=True, check=True
    )
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert found
    return int(found[1]) / ITERATIONS


def show(name: str, lines: list[str], core: str, tool: str, terms: int) -> None:
    """Print every loop with products."""
    for body in loops(lines):
        count = products(body) // terms
        if count * terms >= LEAST:
            own = cycles(body, core, tool)
            print(f"{core:12} {name:34} {count:5} products, {own:6.1f} cycles, "
                  f"{own * WEIGHTS / count:6.1f} for 16 x 32", flush=True)  # fmt: skip


def functions(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and text of llama.cpp's functions for types of four bits in groups of 32."""
    for i, line in enumerate(lines):
        if found := re.match(r"(ggml_gem[mv]_(?:mxfp4|iq4_nl|q4_0)_4x[48]_q8_0):", line):
            end = next(j for j in range(i, len(lines)) if ".cfi_endproc" in lines[j])
            yield found[1], lines[i:end]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--core", nargs="+", default=CORES)
    parser.add_argument("--peer", type=Path, help="assembly of llama.cpp's repack.cpp")
    parser.add_argument(
        "--mca", default="llvm-mca", help="the program; models need LLVM 17 or later"
    )
    args = parser.parse_args()
    for core in args.core:
        target = Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": core})
        for m in (1, 64):
            kernel = linear_kernel(LinearSpec("amxfp4", 2048, 2048, INT8, m=m), target)
            module = tvm.IRModule({"f": kernel.func.with_attr("global_symbol", "f")})
            text = tvm.compile(module, target).mod.inspect_source("asm")
            show(f"{kernel.rule}, {m} rows", text.splitlines(), core, args.mca, 2)
        if args.peer:
            for name, lines in functions(args.peer.read_text().splitlines()):
                show(name, lines, core, args.mca, 1)


if __name__ == "__main__":
    main()
