"""`amx-tvm export`: a bundle for another machine, with progress, and what came out."""

from __future__ import annotations

import json
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Runtime(str, Enum):
    """What a bundle brings to run its model."""

    all = "all"
    python = "python"
    runner = "runner"
    none = "none"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        name="export",
        epilog="Examples:\n\n"
        "amx-tvm export dist/smollm2 --target raspberry-pi/4b-aarch64 -o smollm2-pi4.tar.zst\n\n"
        "amx-tvm export model.gguf --quantization int4 --target x86-64-v3 -o dist/smollm2-v3\n\n"
        "amx-tvm export dist/smollm2 --target raspberry-pi/5-aarch64 --runtime runner -o dist/pi5"
        "\n\n"
        "amx-tvm export dist/smollm2 --target android-aarch64 --runtime none --no-link -o phone",
    )(export)


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An artifact, or a model as for `compile`.")
    ],
    target: Annotated[
        str,
        typer.Option(help="The device, such as raspberry-pi/4b-aarch64, or x86-64-v3,x86-64-v4."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A directory, or FILE.tar.zst, .tar.gz, .tar.")
    ],
    quantization: Annotated[
        str | None, typer.Option(help="As for `compile`; an artifact keeps its own.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Compute with unrounded float32 activations.")
    ] = False,
    records: Annotated[
        Path | None, typer.Option(help="Tuning records of the target: a file or a folder.")
    ] = None,
    runtime: Annotated[
        Runtime, typer.Option(help="What the bundle brings to run the model.")
    ] = Runtime.all,
    python: Annotated[
        list[str] | None,
        typer.Option(help="The device's Python version, such as 3.11; repeatable."),
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(help="Folder with TVM's wheels for the device; else pip.")
    ] = None,
    link: Annotated[
        bool,
        typer.Option("--link/--no-link", help="Link here, or write objects to link elsewhere."),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle at the output.")
    ] = False,
    sign: Annotated[
        Path | None, typer.Option(help="Private key (Ed25519, PEM) to sign the bundle with.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was made as one JSON object.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Make a bundle that runs on another machine."""
    from amx_tvm.cli import early

    early.check(target, quantization, strict)
    from amx_tvm.exporting.api import PYTHONS, RUNTIMES
    from amx_tvm.exporting.api import export as make

    runtimes = {Runtime.all: RUNTIMES, Runtime.none: ()}.get(runtime, (runtime.value,))
    from rich.console import Console

    from amx_tvm.cli.compile_command import StageProgress

    console = Console(stderr=True)
    start = time.perf_counter()
    with StageProgress(console, not quiet) as progress:
        bundle = make(
            model,
            target,
            output,
            quantization=quantization,
            strict=strict,
            records=records,
            runtimes=runtimes,
            pythons=tuple(python) if python else PYTHONS,
            wheels=wheels,
            link=link,
            overwrite=overwrite,
            sign=sign,
            progress=progress,
        )
    if as_json:
        made = {
            "path": str(bundle.path),
            "model": bundle.manifest.model["name"],
            "target": bundle.manifest.target.key,
            "variants": bundle.manifest.targets[1:],
            "bytes": bundle.bytes,
            "runtime_bytes": bundle.runtime_bytes,
            "linked": bundle.manifest.linked,
        }
        print(json.dumps(made))
        return
    if not quiet:
        targets = " and ".join(bundle.manifest.targets)
        console.print(
            f"[green]{bundle.manifest.model['name']}[/] for {targets}: "
            f"{bundle.bytes / 1e6:.1f} MB, of which {bundle.runtime_bytes / 1e6:.1f} MB run it, "
            f"{time.perf_counter() - start:.1f} s",
            highlight=False,
        )
    print(bundle.path)
