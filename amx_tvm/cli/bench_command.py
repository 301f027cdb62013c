"""`amx-tvm bench`: how fast an artifact runs here, and how near that is to the memory's limit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        name="bench",
        epilog="Examples:\n\n"
        "amx-tvm bench dist/smollm2\n\n"
        "amx-tvm bench dist/smollm2 --context 128 --context 4096 --batch 1 --threads 1\n\n"
        "amx-tvm bench dist/smollm2 --json | jq .decode",
    )(bench)


def bench(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="Directory that `compile` made.")
    ],
    prompt: Annotated[
        list[int] | None, typer.Option(help="Prompt length in tokens; repeatable. [512]")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Tokens cached before decoding; repeatable. [128 1024]")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences decoded at once; repeatable. [1 8]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Decode steps a repeat.")] = 16,
    repeats: Annotated[int, typer.Option(help="Repeats that medians are taken over.")] = 5,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; by default the physical cores.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure prefill and decode speed, bandwidth, time to first token, load time and memory."""
    from amx_tvm.bench import measure

    report = measure.bench(
        artifact,
        prompt or (512,),
        context or (128, 1024),
        batch or (1, 8),
        steps,
        repeats,
        device,
        threads,
    )
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        show(report)


def show(report: Any) -> None:
    """Print a report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console = Console(highlight=False, width=120)
    console.print(
        f"[bold]{report.model}[/] {report.format} on {report.device}, {report.threads} threads: "
        f"loaded in {report.load_s:.2f} s, peak memory {report.peak_bytes / 2**20:.0f} MiB"
    )
    if report.read_bandwidth:
        console.print(f"memory reads: {report.read_bandwidth / 1e9:.1f} GB/s")
    table = Table(title="Prefill", title_justify="left")
    for column in ("prompt", "tokens/s", "quartiles", "first token, s"):
        table.add_column(column, justify="right")
    for row in report.prefill:
        table.add_row(
            str(row.tokens), f"{row.tokens_per_s:.1f}", _spread(row), f"{row.first_token_s:.3f}"
        )
    console.print(table)
    table = Table(title="Decode", title_justify="left")
    for column in ("context", "batch", "tokens/s", "quartiles", "MB a token", "GB/s", "of reads"):
        table.add_column(column, justify="right")
    for row in report.decode:
        table.add_row(
            str(row.context),
            str(row.batch),
            f"{row.tokens_per_s:.1f}",
            _spread(row),
            f"{row.bytes_per_token / 1e6:.1f}",
            f"{row.gb_per_s:.1f}",
            "" if row.share is None else f"{row.share:.0%}",
        )
    console.print(table)


def _spread(row: Any) -> str:
    low, high = row.quartiles
    return f"{low:.1f}-{high:.1f}"
