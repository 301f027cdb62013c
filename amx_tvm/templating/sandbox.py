"""Jinja's sandbox with the names and settings of Hugging Face's ``apply_chat_template``.

``raise_exception``, ``strftime_now``, a ``tojson`` that does not escape HTML, ``{% generation %}``
blocks, loop controls, and trimmed blocks. Where a template makes text of a list, an object, a truth
value or null, transformers shows Python's spelling, and here it is JSON's. Null is printed as
nothing; ``| string`` spells it out. Needs jinja2 only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, Undefined, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from amx_tvm.templating import limits


class LimitError(Exception):
    """A template went beyond a limit; the message says which."""


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Array(list[Any]):
    """A list that is JSON wherever it becomes text."""

    __module__ = "builtins"  # jinja2's errors name it without where it comes from

    def __repr__(self) -> str:
        return _tojson(self)


class Object(dict[str, Any]):
    """An object that is JSON wherever it becomes text."""

    __module__ = "builtins"

    def __repr__(self) -> str:
        return _tojson(self)


class _Environment(ImmutableSandboxedEnvironment):
    """Counts the turns of all ``for`` loops of a rendering in ``turns``.

    What ``~`` joins is what printing it would show.
    """

    turns = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            counted = nodes.Filter(loop.iter, "counted", [], [], None, None)
            loop.iter = counted.set_lineno(loop.lineno).set_environment(self)
        for joined in tree.find_all(nodes.Concat):
            joined.nodes = [nodes.Filter(n, "printed", [], [], None, None) for n in joined.nodes]
            joined.set_lineno(joined.lineno).set_environment(self)
        return tree

    def count(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.turns += 1
            if self.turns > limits.LOOPS:
                raise LimitError(f"its loops turn more than {limits.LOOPS} times")
            yield item


def _raise_exception(message: Any = "") -> None:
    raise TemplateError(str(message))


def _strftime_now(style: str) -> str:
    return datetime.now().strftime(style)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _printed(value: Any) -> Any:
    if isinstance(value, dict | list | tuple):  # truth values print as in transformers
        return _tojson(value)
    if isinstance(value, str | int | float | Undefined):
        return value
    if value is None:
        return ""
    # Python would print a function's or a generator's address.
    raise TemplateError(f"it prints a {type(value).__name__}, which is no text")


def _string(value: Any) -> str:
    return "null" if value is None else str(_printed(value))


def _spelled(value: Any) -> Any:
    """Return a value whose lists and objects are JSON where they become text."""
    if isinstance(value, dict):
        return Object({key: _spelled(item) for key, item in value.items()})
    return Array(map(_spelled, value)) if isinstance(value, list) else value


@pass_context  # otherwise Jinja would run it once, when it compiles a loop over constants
def _counted(context: Any, items: Any) -> Iterator[Any]:
    return context.environment.count(items)


@lru_cache(maxsize=1)
def environment() -> _Environment:
    """Return the sandboxed environment."""
    made = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_printed,
    )
    made.filters.update(tojson=_tojson, counted=_counted, printed=_printed, string=_string)
    made.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return made


@lru_cache(maxsize=32)
def compiled(source: str) -> Template:
    """Return a compiled template.

    Raises
    ------
    LimitError
        When its source is too long.
    Exception
        Of any kind: jinja2 and Python's compiler have many for a program that is none.
    """
    if len(source) > limits.SOURCE_CHARACTERS:
        raise LimitError(f"its source has more than {limits.SOURCE_CHARACTERS} characters")
    return environment().from_string(source)


def rendered(source: str, names: dict[str, Any]) -> str:
    """Return what a template makes of ``names``; errors as `compiled`'s, and the program's own."""
    template, pieces, length = compiled(source), [], 0
    environment().turns = 0
    for piece in template.generate(_spelled(names)):
        pieces.append(piece)
        length += len(piece)
        if length > limits.OUTPUT_CHARACTERS:
            raise LimitError(f"it prints more than {limits.OUTPUT_CHARACTERS} characters")
    return "".join(pieces)
