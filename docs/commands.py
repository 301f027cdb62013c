"""A hook of mkdocs: the page of commands is what the command line's own help says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PAGE, PLACE = "reference/commands.md", "<!-- the commands -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the commands where the page has room for them."""
    if page.file.src_uri != PAGE:
        return markdown
    return markdown.replace(PLACE, "\n".join(command_lines()))


def command_lines() -> Iterator[str]:
    """Yield Markdown of every command: help, arguments, options, examples."""
    import typer

    from amx_tvm.cli.app import app

    for name, command in leaves(typer.main.get_command(app), "amx-tvm"):
        yield f"## {name}\n"
        yield (command.help or "").strip() + "\n"
        rows = [(_names(parameter), _about(parameter)) for parameter in command.params]
        if rows:
            yield "| option | what |\n| --- | --- |"
            yield from (f"| {names} | {about} |" for names, about in rows)
            yield ""
        lines = [line.strip() for line in (command.epilog or "").splitlines() if line.strip()]
        if any(line.startswith("Example") for line in lines):
            yield from (line if "amx-tvm " not in line else f"    {line}\n" for line in lines)
            yield ""


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the commands below a group, with their whole names."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for part, below in sorted(command.commands.items()):
        yield from leaves(below, f"{name} {part}")


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _about(parameter: Any) -> str:
    about = (getattr(parameter, "help", None) or "").replace("|", "\\|").replace("\n", " ")
    default = parameter.default
    plain = default is not None and not callable(default) and default not in (False, ())
    return about + (f" Default: {getattr(default, 'value', default)}." if plain else "")
