"""`amx-tvm quantize`: a model's weights rounded once, as a safetensors checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        name="quantize",
        epilog="Example:\n\namx-tvm quantize path/to/model --output dist/model-amxfp4",
    )(quantize)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model as for `compile`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new directory.")],
    quantization: Annotated[str, typer.Option(help="Format of the weights.")] = "amxfp4",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was made as one JSON object.")
    ] = False,
) -> None:
    """Write a model's quantized weights as a checkpoint that `compile` takes."""
    from rich.console import Console

    from amx_tvm.cli import early

    early.check(quantization=quantization)
    from amx_tvm.cli.compile_command import StageProgress
    from amx_tvm.compiler.checkpoint import quantize_checkpoint

    console = Console(stderr=as_json)
    with StageProgress(console, console.is_terminal) as show:
        place = quantize_checkpoint(
            model,
            output,
            quantization,
            lambda done, total, name: show("weights", done, total, name),
        )
    size = (place / "model.safetensors").stat().st_size
    if as_json:
        print(json.dumps({"path": str(place), "quantization": quantization, "bytes": size}))
        return
    console.print(f"{place}: {size / 2**20:.1f} MiB of weights in {quantization}")
