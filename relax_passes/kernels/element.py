"""One element of a packed table as float32, from its code and stored scales: any format's terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx


def element(
    fmt: Any, code: Any, stored: Callable[[str], Any], let: Callable[[Any], Any]
) -> tirx.Expr:
    """Decode an element.

    Parameters
    ----------
    fmt : Format
        Of the registry.
    code : tirx.Expr
        uint8.
    stored : callable
        Name of a scale tensor -> what is stored for the element's group.
    let : callable
        Bind a value that is read more than once.

    Returns
    -------
    tirx.Expr
        float32, without the format's scale of a tensor.
    """
    total: Any = None
    for term in fmt.terms:
        integer = tirx.Cast("float32", code) if term.table is None else _lookup(term.table, code)
        if isinstance(term.offset, str):
            integer = integer - tirx.Cast("float32", stored(term.offset))
        elif term.offset:
            integer = integer - tirx.const(float(term.offset), "float32")
        scale = fmt.decode_scale_tir(term.scale, let(stored(term.scale)))
        value = integer * scale * tirx.const(term.factor, "float32")
        total = value if total is None else total + value
    return total


def _lookup(table: tuple[int, ...], code: tirx.Expr) -> tirx.Expr:
    """Select one of sixteen small integers, as float32."""
    value = tirx.const(float(table[0]), "float32")
    for index, entry in enumerate(table):
        if index:
            here = tirx.EQ(code, tirx.const(index, "uint8"))
            value = tirx.Select(here, tirx.const(float(entry), "float32"), value)
    return value
