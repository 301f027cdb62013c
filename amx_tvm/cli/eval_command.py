"""`amx-tvm eval`: perplexity of artifacts on a text, and distances from a reference artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        name="eval",
        epilog="Examples:\n\n"
        "amx-tvm eval dist/smollm2 --text book.txt --window 1024 --limit 8\n\n"
        "amx-tvm eval dist/a dist/b --text book.txt --reference dist/none --json",
    )(evaluate)


def evaluate(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT...", help="Directories that `compile` made.")
    ],
    text: Annotated[Path, typer.Option(help="Text file or data set directory.")],
    reference: Annotated[
        Path | None, typer.Option(help="Artifact to measure KL and top-1 agreement against.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    stride: Annotated[int, typer.Option(help="Tokens between windows; 0 is the window.")] = 0,
    limit: Annotated[int, typer.Option(help="Most windows; 0 is all.")] = 0,
    start: Annotated[int, typer.Option(help="Characters of the text to skip.")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; by default the physical cores.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity; with a reference also KL divergence and top-1 agreement."""
    from rich.console import Console
    from rich.progress import Progress

    from amx_tvm.evaluation import Protocol, report
    from amx_tvm.evaluation import evaluate as measure

    protocol = Protocol(window, stride, limit)
    results = []
    with Progress(console=Console(stderr=True), transient=True) as bars:
        for path in artifacts:
            task = bars.add_task(path.name, total=None)

            def tell(done: int, total: int, _text: str, task=task) -> None:  # noqa: ANN001
                bars.update(task, completed=done, total=total)

            results.append(
                measure(
                    path,
                    text,
                    reference=reference,
                    protocol=protocol,
                    start=start,
                    threads=threads,
                    progress=tell,
                )
            )
    if as_json:
        settings = {"text": str(text), "window": window, "stride": stride, "start": start}
        print(report.to_json(results, settings))
    else:
        print(report.table(results))
