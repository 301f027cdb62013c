"""`amx-tvm serve`: an artifact behind an OpenAI-compatible HTTP interface."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from amx_tvm.errors import AmxError


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        name="serve",
        epilog="Examples:\n\n"
        "amx-tvm serve dist/smollm2\n\n"
        "amx-tvm serve dist/smollm2 --host 0.0.0.0 --api-key SECRET --max-sequences 32\n\n"
        'curl http://127.0.0.1:8000/v1/completions -d \'{"prompt": "Once", "max_tokens": 16}\'',
    )(serve)


def serve(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="Directory that `compile` made.")
    ],
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Name in answers, by default the artifact's; further ones are aliases."),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests must carry; repeatable.", envvar="AMX_TVM_API_KEY"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; by default the physical cores.")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Longest prompt and answer; by default at most 4096.")
    ] = None,
    max_sequences: Annotated[
        int, typer.Option(min=1, help="Most answers that are generated at once.")
    ] = 16,
    keep: Annotated[
        int, typer.Option(min=0, help="Most ended answers kept for prompts that begin like them.")
    ] = 64,
    kv_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of all answers, kept ones too; by default what fits."),
    ] = None,
    speculation: Annotated[
        bool,
        typer.Option(help="Decode text that repeats several tokens a step, where that is faster."),
    ] = True,
    queue: Annotated[int, typer.Option(min=0, help="Most answers that wait; then 429.")] = 256,
    queue_tokens: Annotated[
        int, typer.Option(min=0, help="Most prompt tokens that wait; then 429.")
    ] = 1 << 20,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that an answer may take; then 504.")
    ] = None,
    drain: Annotated[
        int, typer.Option(min=0, help="Seconds that answers get to end after SIGTERM.")
    ] = 60,
    certificate: Annotated[Path | None, typer.Option(help="PEM file: HTTPS.")] = None,
    private_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    image_folder: Annotated[
        Path | None, typer.Option(help="Files in it may be images, as file: URIs.")
    ] = None,
    image_url: Annotated[
        list[str] | None,
        typer.Option(help="Beginning of addresses that are read as images; repeatable."),
    ] = None,
    require_signature: Annotated[
        Path | None, typer.Option(help="Public key that must have signed the artifact.")
    ] = None,
) -> None:
    """Serve an artifact to OpenAI clients until SIGINT or SIGTERM."""
    from amx_tvm.artifact import Manifest
    from amx_tvm.cli.embed_command import load_embedder
    from amx_tvm.cli.generate_command import load_engine
    from amx_tvm.runtime import EmbeddingEngine, Engine
    from amx_tvm.runtime.engine import DEFAULT_CONTEXT

    try:
        from amx_tvm.server import app, limits, run, sizing
        from amx_tvm.server.address import Address
        from amx_tvm.server.images import ImageAccess
    except ImportError as error:
        raise AmxError(
            f"serving needs the package {error.name!r}, which is not installed; install the extra "
            "`serve`: pip install 'amx-tvm[serve]', or from a checkout pip install -e '.[serve]'"
        ) from None
    address = Address(
        host,
        port,
        str(certificate) if certificate else None,
        str(private_key) if private_key else None,
        drain,
    )
    manifest = Manifest.load(artifact)
    address.check()
    images = ImageAccess(image_folder, tuple(image_url or ()))
    images.check()
    if kv_tokens is None and manifest.kind == "causal_lm":
        context = context_length or min(manifest.model["context_length"], DEFAULT_CONTEXT)
        kv_tokens = sizing.default_tokens(artifact, manifest, context, max_sequences)
    common = {"device": device, "threads": threads, "require_signature": require_signature}
    engine: Engine | EmbeddingEngine
    if manifest.kind == "embedding":
        engine = load_embedder(artifact, common)
        what = f"vectors of {engine.dimension} numbers, of texts of {engine.settings.max_tokens} "
        what += "tokens"
    else:
        options = {
            "context_length": context_length,
            "max_sequences": max_sequences + keep,
            "kv_tokens": kv_tokens,
            "speculation": speculation,
        }
        engine = load_engine(artifact, {**common, **options})
        what = f"{max_sequences} answers at once in {kv_tokens} tokens of cache, "
        what += f"{engine.context_length} tokens of context each"
    names = name or [artifact.resolve().name]
    settings = app.Settings(
        names[0],
        tuple(names[1:]),
        frozenset(api_key or ()),
        limits.Limits(queue, queue_tokens, keep, timeout_s=timeout),
        images,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    scheme = "https" if certificate else "http"
    print(f"{names[0]} at {scheme}://{host}:{port}/v1: {what}", file=sys.stderr)
    raise typer.Exit(run.serve(engine, settings, address))
