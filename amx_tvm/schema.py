"""Values of files that somebody else wrote, checked against types; errors name the field.

A schema is written as Python's own types: a dataclass, a `TypedDict`, ``list[int]``,
``dict[str, float]``, ``int | None``. A `TypedDict` checks the keys that it names and keeps the
others, a dataclass takes no others. ``Annotated[int, Range(1, 8)]`` bounds a number, and
``Annotated[str, INSIDE]`` a file's name.
"""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import (
    Annotated,
    Any,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)


class Mismatch(ValueError):
    """A value that is not what its schema says; the message names the field and both."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included."""

    low: float
    high: float

    def __call__(self, value: Any) -> bool:
        """Whether a number lies inside."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"from {self.low:.16g} to {self.high:.16g}"


@dataclass(frozen=True)
class OneOf:
    """The values that a field may have."""

    values: tuple[Any, ...]

    def __call__(self, value: Any) -> bool:
        """Whether a value is one of them."""
        return value in self.values

    def __str__(self) -> str:
        return f"of {', '.join(map(str, self.values))}"


@dataclass(frozen=True)
class _Inside:
    def __call__(self, value: str) -> bool:
        path = PurePosixPath(value)
        parts = path.parts
        return bool(parts) and not path.is_absolute() and ".." not in parts and "\0" not in value

    def __str__(self) -> str:
        return "that names a file inside the directory"


INSIDE = _Inside()
FileName = Annotated[str, INSIDE]
# Sizes and counts of what is described; files and tensors beyond them exist nowhere.
Count = Annotated[int, Range(1, 2**31 - 1)]
Size = Annotated[int, Range(0, 2**53)]
TokenId = Annotated[int, Range(0, 2**31 - 1)]

_NAMES = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}


def conform(kind: Any, value: Any, name: str = "") -> Any:
    """Return a parsed JSON value as its schema has it.

    Parameters
    ----------
    kind : type
        The schema; see the module's docstring.
    value : any
        What `json` made of the file.
    name : str
        The field, for messages.

    Returns
    -------
    any
        The same value, with instances of dataclasses for objects, and numbers of the type that the
        schema names (a whole float for an int).

    Raises
    ------
    Mismatch
        With the field, its value and what was expected.
    """
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        base, *bounds = get_args(kind)
        made = conform(base, value, name)
        for bound in bounds:
            if not bound(made):
                raise _mismatch(name, value, f"{_described(base)} {bound}")
        return made
    if origin in (Union, types.UnionType):
        return _any_of(get_args(kind), kind, value, name)
    if origin in (list, tuple):  # tuple[X, ...]
        _checked(isinstance(value, list | tuple), kind, value, name)
        item = get_args(kind)[0]
        made = [conform(item, entry, f"{name}[{index}]") for index, entry in enumerate(value)]
        return made if origin is list else tuple(made)
    if origin is dict:
        _checked(isinstance(value, dict), kind, value, name)
        keys, item = get_args(kind)
        return {
            conform(keys, key, f"a key of {name}"): conform(item, entry, _join(name, key))
            for key, entry in value.items()
        }
    if is_dataclass(kind) or is_typeddict(kind):
        _checked(isinstance(value, dict), kind, value, name)
        return _record(kind, value, name) if is_dataclass(kind) else _object(kind, value, name)
    return _plain(kind, value, name)


def _plain(kind: Any, value: Any, name: str) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and (whole or isinstance(value, float)):
        try:
            return float(_checked(math.isfinite(value), kind, value, name))
        except OverflowError:
            raise _mismatch(name, value, _described(kind)) from None
    right = whole if kind is int else isinstance(value, kind)
    return _checked(right, kind, value, name)


def _any_of(kinds: tuple[Any, ...], kind: Any, value: Any, name: str) -> Any:
    problems = []
    for one in kinds:
        try:
            return conform(one, value, name)
        except Mismatch as problem:
            problems.append(problem.with_traceback(None))  # no cycle that keeps the caller's frames
    # Of an object or a list that is nearly right, the part that is wrong says most.
    inner = [problem for problem in problems if not str(problem).startswith(f"{name or 'it'} is")]
    found = inner[0] if inner else _mismatch(name, value, _described(kind))
    problems, inner = [], []
    try:
        raise found
    finally:
        del found


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _record(kind: Any, value: dict[str, Any], name: str) -> Any:
    known = {field.name: field for field in fields(kind)}
    for key in value:
        if key not in known:
            raise Mismatch(f"{_join(name, key)} is no field of {name or 'it'}")
    for key, field in known.items():
        if key not in value and field.default is MISSING and field.default_factory is MISSING:
            raise Mismatch(f"{_join(name, key)} is missing")
    hints = _hints(kind)
    return kind(
        **{key: conform(hints[key], entry, _join(name, key)) for key, entry in value.items()}
    )


def _object(kind: Any, value: dict[str, Any], name: str) -> dict[str, Any]:
    for key in sorted(kind.__required_keys__):
        if key not in value:
            raise Mismatch(f"{_join(name, key)} is missing")
    made = dict(value)
    for key, wanted in _hints(kind).items():
        if key in value:
            made[key] = conform(wanted, value[key], _join(name, key))
    return made


def _checked(right: bool, kind: Any, value: Any, name: str) -> Any:
    if not right:
        raise _mismatch(name, value, _described(kind))
    return value


def _mismatch(name: str, value: Any, expected: str) -> Mismatch:
    kinds = {dict: "an object", list: "a list", type(None): "null"}
    shown = kinds.get(type(value)) or repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return Mismatch(f"{name or 'it'} is {shown}; expected {expected}")


def _described(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return " ".join([_described(arguments[0]), *map(str, arguments[1:])])
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one) for one in arguments)
    if origin in (list, tuple):
        return f"a list, each of it {_described(arguments[0])}"
    if kind is types.NoneType:
        return "null"
    objects = is_dataclass(kind) or is_typeddict(kind) or origin is dict
    return _NAMES.get(kind) or ("an object" if objects else f"of type {kind.__name__}")


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else str(key)
