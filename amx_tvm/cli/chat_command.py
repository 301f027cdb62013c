"""`amx-tvm chat`: a conversation whose tokens stay in the KV cache between turns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from amx_tvm.cli import interrupt
from amx_tvm.cli.generate_command import load_engine, summary
from amx_tvm.errors import GenerationError
from amx_tvm.runtime.chat import load_chat_template
from amx_tvm.runtime.options import read_options, text

_HELP = (
    "/reset forgets the conversation, /exit or /quit leaves, /help shows this, Ctrl-C cuts an "
    "answer short; any other line is said to the model."
)


def run(
    artifact: Path,
    system: str | None,
    quiet: bool,
    load: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Read turns from stdin and stream the answers to stdout until /exit or the end of input."""
    text("--system", system or "")
    read_options(options)
    engine = load_engine(artifact, load)
    template = load_chat_template(artifact)
    interactive = sys.stdin.isatty()
    if interactive:
        try:
            import readline  # noqa: F401 - gives input() line editing and history
        except ImportError:
            pass
        if not quiet:
            print(f"{engine.manifest.model['name']}. {_HELP}", file=sys.stderr)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    with engine.sequence() as sequence:
        while True:
            try:
                line = text("the line", input("> " if interactive else ""))
            except EOFError:
                return
            except (UnicodeError, GenerationError) as error:
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)
                continue
            words = line.strip()
            if words in ("/exit", "/quit"):
                return
            if words == "/reset":
                messages = list(start)
                continue
            if words == "/help":
                print(_HELP, file=sys.stderr)
                continue
            if not words:
                continue
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(engine, template.render(messages), sequence, options, quiet)
            except GenerationError as error:
                # The conversation no longer fits, or the template refuses it: drop the turn.
                messages.pop()
                if not interactive:
                    raise
                print(f"error: {error} (or /reset)", file=sys.stderr)
                continue
            messages.append({"role": "assistant", "content": answer})


def _answer(engine: Any, prompt: str, sequence: Any, options: dict[str, Any], quiet: bool) -> str:
    """Stream one answer and return it, or the part of it that Ctrl-C left."""
    shown = ""
    with engine.stream(prompt, sequence=sequence, **options) as pieces:
        try:
            for piece in pieces:
                shown += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            interrupt.clear()
            pieces.close()
            pieces.result.finish_reason = "interrupted"
        print()
        if not quiet:
            print(summary(pieces.result), file=sys.stderr)
        return shown
