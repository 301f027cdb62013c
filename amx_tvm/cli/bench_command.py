"""`amx-tvm bench`: how fast an artifact runs here, and how near that is to the memory's limit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from amx_tvm.errors import AmxError


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        name="bench",
        epilog="Examples:\n\n"
        "amx-tvm bench dist/smollm2\n\n"
        "amx-tvm bench dist/smollm2 --context 128 --context 4096 --batch 1 --threads 1\n\n"
        "amx-tvm bench dist/smollm2 --json | jq .decode\n\n"
        "amx-tvm bench --server http://127.0.0.1:8000 --streams 1 --streams 16",
    )(bench)


def bench(
    artifact: Annotated[
        Path | None, typer.Argument(metavar="ARTIFACT", help="Directory that `compile` made.")
    ] = None,
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
    server: Annotated[
        str | None, typer.Option(help="Measure the server at this address instead.")
    ] = None,
    streams: Annotated[
        list[int] | None,
        typer.Option(min=1, max=256, help="Answers of a server at once; repeatable. [1 8 16]"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of a server's answer.")] = 128,
    api_key: Annotated[str, typer.Option(help="Key of the server.", envvar="AMX_TVM_API_KEY")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure prefill and decode speed, bandwidth, time to first token, load time and memory."""
    from amx_tvm.bench import measure, serving

    if (artifact is None) == (server is None):
        raise AmxError("give an ARTIFACT or --server URL, one of them")
    if server is not None:
        words = (prompt or [128])[0]
        loads = [
            serving.measure(server, count, words, tokens, repeats, api_key)
            for count in streams or (1, 8, 16)
        ]
        if as_json:
            print(json.dumps({"server": server, "streams": [load.to_dict() for load in loads]}))
        else:
            show_loads(loads)
        return
    assert artifact is not None

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
    console.print(
        f"KV cache: {report.token_bytes / 1024:.1f} KiB a token, "
        f"{(1 << 30) // report.token_bytes} tokens a GiB"
    )
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


def show_loads(loads: list[Any]) -> None:
    """Print what a server gave as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Server; milliseconds at p50, p95, p99", title_justify="left")
    for column in ("streams", "tokens/s", "first token", "between tokens"):
        table.add_column(column, justify="right")
    for load in loads:
        times = [
            ", ".join(f"{1000 * value:.1f}" for value in found.values())
            for found in (load.first_token_s, load.between_tokens_s)
        ]
        table.add_row(str(load.streams), f"{load.tokens_per_s:.1f}", *times)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def _spread(row: Any) -> str:
    low, high = row.quartiles
    return f"{low:.1f}-{high:.1f}"
