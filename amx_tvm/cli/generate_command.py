"""`amx-tvm generate`: stream a continuation to stdout, its timings to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amx_tvm.errors import GenerationError
from amx_tvm.runtime import EmbeddingEngine, Engine, GenerationResult
from amx_tvm.runtime import load as load_artifact
from amx_tvm.runtime.options import read_options, text


def run(
    artifact: Path,
    prompt: str,
    chat: bool,
    as_json: bool,
    quiet: bool,
    load: dict[str, Any],
    options: dict[str, Any],
    images: Sequence[Path] = (),
    adapter: str | None = None,
) -> None:
    """Load the artifact and print the continuation of ``prompt``."""
    prompt = text("the prompt", sys.stdin.read() if prompt == "-" else prompt)
    read_options(options)
    engine = load_engine(artifact, load)
    if chat:
        from amx_tvm.runtime.chat import load_chat_template

        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt}]
        content = parts if images else prompt
        prompt = load_chat_template(artifact).render([{"role": "user", "content": content}])
    with engine.stream(prompt, images=images, adapter=adapter, **options) as pieces:
        for piece in pieces:
            if not as_json:
                print(piece, end="", flush=True)
        result = pieces.result
    if as_json:
        print(json.dumps(as_dict(result), ensure_ascii=False))
        return
    print()
    if not quiet:
        print(summary(result), file=sys.stderr)


def load_engine(artifact: Path, options: dict[str, Any]) -> Engine:
    """Load a language model; GenerationError if the artifact is something else."""
    engine = load_artifact(artifact, **options)
    if isinstance(engine, EmbeddingEngine):
        raise GenerationError(
            f"{artifact} makes embeddings and generates no text; use `amx-tvm embed` or `serve`"
        )
    if not isinstance(engine, Engine):
        raise GenerationError(
            f"{artifact} is a compiled function, not a language model; call it from Python: "
            "amx_tvm.load(...)(x)"
        )
    return engine


def summary(result: GenerationResult) -> str:
    """Return one line of what a generation took."""
    timings = result.timings
    line = (
        f"[{timings.prefill_tokens} prompt tokens at {timings.prefill_tokens_per_s:.0f} tokens/s, "
        f"first token after {timings.first_token_s:.2f} s"
    )
    if timings.decode_tokens:
        line += (
            f"; {len(result.token_ids)} new tokens, decode at "
            f"{timings.decode_tokens_per_s:.1f} tokens/s"
        )
    return line + f"; {result.finish_reason}]"


def as_dict(result: GenerationResult) -> dict[str, Any]:
    """Return a result as JSON-ready data."""
    timings = result.timings
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "stopped_by": result.stopped_by,
        "timings": {
            **vars(timings),
            "prefill_tokens_per_s": timings.prefill_tokens_per_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
        },
    }
