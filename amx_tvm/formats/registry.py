"""The registry of number formats: one line in a format's own file adds it everywhere.

`get` is what every option, manifest and test resolves names with; `summary` feeds the
documentation and the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

from amx_tvm.errors import FormatError

if TYPE_CHECKING:
    from amx_tvm.formats.base import Format

F = TypeVar("F", bound="Format")

_FORMATS: dict[str, Format] = {}


class FormatSummary(NamedTuple):
    """One row of the table of formats."""

    name: str
    bits_per_value: float
    code_bits: int
    group_size: int
    scales: str  # such as "positive E5M2, negative E5M2"
    tensor_scale: bool
    title: str


def register(fmt: F) -> F:
    """Add a format under its name and return it; a name can be taken once."""
    if fmt.name in _FORMATS:
        raise ValueError(f"number format {fmt.name!r} is registered twice")
    _FORMATS[fmt.name] = fmt
    return fmt


def names() -> list[str]:
    """Names of all formats, in the order of their registration."""
    return list(_FORMATS)


def get(name: str | Format) -> Format:
    """Look up a format by name; a Format is returned as it is.

    Raises
    ------
    FormatError
        The name is unknown; the message lists the known ones.
    """
    if not isinstance(name, str):
        return name
    try:
        return _FORMATS[name]
    except KeyError:
        raise FormatError(
            f"unknown number format {name!r}; choose one of: {', '.join(_FORMATS)}"
        ) from None


def summary() -> list[FormatSummary]:
    """Return the table of formats, one row each, in the order of `names`."""
    return [
        FormatSummary(
            name=fmt.name,
            bits_per_value=fmt.bits_per_value,
            code_bits=fmt.code_bits,
            group_size=fmt.group_size,
            scales=", ".join(f"{s.name} {s.type.name}" for s in fmt.scale_tensors),
            tensor_scale=fmt.row_scaled,
            title=fmt.title,
        )
        for fmt in _FORMATS.values()
    ]
