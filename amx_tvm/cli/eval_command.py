"""`amx-tvm eval`: perplexity of artifacts or formats on a text, errors by layer, standard tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from amx_tvm.errors import EvaluationError
from amx_tvm.extras import plotting


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        name="eval",
        epilog="Examples:\n\n"
        "amx-tvm eval dist/smollm2 --text book.txt --window 1024 --limit 8\n\n"
        "amx-tvm eval dist/a dist/b --text book.txt --reference dist/none --json\n\n"
        "amx-tvm eval model.gguf --formats amxfp4,nvfp4,int4 --text book.txt --plot formats.png\n\n"
        "amx-tvm eval dist/smollm2 --tasks arc_easy,hellaswag --limit 100",
    )(evaluate)


def evaluate(
    artifacts: Annotated[
        list[Path],
        typer.Argument(
            metavar="ARTIFACT...", help="Directories that `compile` made; with --formats a model."
        ),
    ],
    text: Annotated[Path | None, typer.Option(help="Text file or data set directory.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Artifact to measure KL and top-1 agreement against.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    stride: Annotated[int, typer.Option(help="Tokens between windows; 0 is the window.")] = 0,
    limit: Annotated[int, typer.Option(help="Most windows, or examples of a task; 0: all.")] = 0,
    start: Annotated[int, typer.Option(help="Characters of the text to skip.")] = 0,
    formats: Annotated[
        str, typer.Option(help="Compile the model in these, with commas, and compare with float32.")
    ] = "",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Calibration text: formats are calibrated on it; artifacts were."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe of --calibration, by default best.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Errors by layer, of outputs with --calibration.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw a .png, .svg or .pdf.")] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of the lm-eval package, with commas.")] = "",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; by default the physical cores.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity; with a reference also KL divergence and top-1 agreement."""
    from rich.console import Console
    from rich.progress import Progress

    from amx_tvm.evaluation import Protocol, compare, report, settings
    from amx_tvm.evaluation import evaluate as measure

    if plot is not None:
        plotting(plot, EvaluationError)
    if tasks:
        return run_tasks(artifacts, tasks, limit, threads)
    if text is None:
        raise EvaluationError("no text to evaluate on; give --text FILE, or --tasks NAMES")
    if layers and not formats:
        raise EvaluationError("errors by layer compare formats of a model; add --formats NAMES")
    protocol = Protocol(window, stride, limit)
    errors: list[Any] = []
    baseline: float | None = None
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)

        def tell(done: int, total: int, what: str) -> None:
            bars.update(task, completed=done, total=total, description=what)

        if formats:
            names = [name.strip() for name in formats.split(",") if name.strip()]
            options = {"calibration": calibration, "recipe": recipe}
            source = one_model(artifacts)
            if layers:
                errors = layer_errors(source, names, calibration, tell)
            results = compare(
                source, names, text, protocol=protocol, start=start, options=options, progress=tell
            )
            baseline = results[0].perplexity
        else:
            results = [
                measure(
                    path,
                    text,
                    reference=reference,
                    protocol=protocol,
                    start=start,
                    calibration=calibration,
                    threads=threads,
                    progress=tell,
                )
                for path in artifacts
            ]
            known = [r for p, r in zip(artifacts, results, strict=True) if p == reference]
            if known:
                baseline = known[0].perplexity
    if plot is not None:
        report.plot(results, plot, report.curves(errors), baseline)
    if as_json:
        print(report.to_json(results, settings(protocol, text, start=start), errors))
        return
    print(report.table(results, baseline))
    if errors:
        print("\n" + report.layer_table(errors))


def one_model(models: list[Path]) -> Any:
    """Open the model whose formats are compared."""
    from amx_tvm.frontends import open_model

    if len(models) != 1:
        raise EvaluationError(f"--formats compares formats of one model; {len(models)} were given")
    return open_model(str(models[0]))


def layer_errors(source: Any, names: list[str], calibration: Path | None, tell: Any) -> list[Any]:
    """Errors of a model's linears under formats: of outputs on a text, or of the weights."""
    from amx_tvm.evaluation import output_errors, weight_errors

    plain = list(dict.fromkeys(n.removesuffix("-w4a4") for n in names if n != "none"))
    if calibration is None:
        return list(weight_errors(source, plain, tell))
    return output_errors(source, plain, calibration, lambda _stage, *rest: tell(*rest))


def run_tasks(artifacts: list[Path], tasks: str, limit: int, threads: int | None) -> None:
    """Run tasks of the lm-eval package and print their results as JSON."""
    from amx_tvm.evaluation import harness
    from amx_tvm.runtime import load

    harness.require_lm_eval()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = {
        path.name: harness.run_tasks(load(path, threads=threads), names, limit=limit or None)
        for path in artifacts
    }
    print(json.dumps(found, indent=1, default=str))
