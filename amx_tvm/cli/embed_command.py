"""`amx-tvm embed`: vectors of texts, as JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amx_tvm.errors import GenerationError

if TYPE_CHECKING:
    from amx_tvm.runtime import EmbeddingEngine


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        name="embed",
        epilog="Examples:\n\n"
        'amx-tvm embed dist/minilm "A dog runs." "Ein Hund rennt."\n\n'
        "amx-tvm embed dist/embeddinggemma - --prompt-name query < questions.txt",
    )(embed)


def embed(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="Directory that `compile` made.")
    ],
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT...", help="Texts; - reads standard input, one a line."),
    ],
    prompt_name: Annotated[
        str | None, typer.Option(help="Which of the model's prompts goes in front of the texts.")
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Keep so many of a vector's first values.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts that are too long, instead of refusing.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; by default the physical cores.")
    ] = None,
    require_signature: Annotated[
        Path | None, typer.Option(help="Public key that must have signed the artifact.")
    ] = None,
) -> None:
    """Print the vector of each text as a line of JSON."""
    given = [line for text in texts for line in (_lines() if text == "-" else [text])]
    engine = load_embedder(artifact, {"threads": threads, "require_signature": require_signature})
    vectors = engine.embed(given, prompt_name=prompt_name, dimensions=dimensions, truncate=truncate)
    for vector in vectors:
        print(json.dumps([float(f"{value:.7g}") for value in vector]))


def load_embedder(artifact: Path, options: dict[str, Any]) -> EmbeddingEngine:
    """Load a model of embeddings; GenerationError if the artifact is something else."""
    from amx_tvm.runtime import EmbeddingEngine
    from amx_tvm.runtime import load as load_artifact

    engine = load_artifact(artifact, **options)
    if not isinstance(engine, EmbeddingEngine):
        raise GenerationError(
            f"{artifact} is of the kind {engine.manifest.kind} and makes no embeddings; compile a "
            "model that does (BERT type, ModernBERT, EmbeddingGemma, Qwen3-Embedding)"
        )
    return engine


def _lines() -> list[str]:
    return sys.stdin.read().splitlines()
