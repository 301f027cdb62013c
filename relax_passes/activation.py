"""What a linear's activations are when its product is computed: a decision, and its tensors.

    float32, float16      x as it is, in the compute type
    int8                  codes in groups of 32 columns under one scale
    int8-outliers         the same with a second byte in the groups that hold outliers
    fp4:FORMAT[+46]       codes of a four-bit format, maybe with four over six's choice of scales
    fp4:...-outliers      the same, codes of both signs as one integer, in int8-outliers' form
    fake:FORMAT           the values that these codes stand for, in float16
    e4m3                  bytes of E4M3 under one scale a row, beside x itself (CUDA)

The text is for the command line, printed IR and the manifest; everywhere else it is an
:class:`Activation`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from amx_tvm.errors import FormatError

if TYPE_CHECKING:
    from amx_tvm.formats.base import Format

E4M3_ROWS = 33  # rows of x from which on E4M3 is multiplied, where a linear is for it
GROUP = 32  # columns of x under one scale, and columns of W in one packed tile
Buffers = tuple[tuple[str, tuple, str], ...]  # (name, shape after M, dtype) each

_OUTLIERS, _FOUR_OVER_SIX = "-outliers", "+46"


class Scheme(Enum):
    """The kinds of activations."""

    EXACT = "exact"
    INTEGER = "int8"
    FOUR_BIT = "fp4"
    ROUNDED = "fake"
    E4M3 = "e4m3"


@dataclass(frozen=True)
class Activation:
    """How the input of a linear is represented.

    Parameters
    ----------
    scheme : Scheme
        Which kind.
    dtype : str
        EXACT: the type of x, "float32" or "float16".
    format : str
        FOUR_BIT and ROUNDED: name of the format in ``amx_tvm.formats``.
    outliers : bool
        INTEGER: groups with outliers have a second byte. FOUR_BIT: the codes of both signs are one
        integer, with a second byte in the groups whose scales need it.
    four_over_six : bool
        FOUR_BIT: the better of two scales is chosen for each group.
    """

    scheme: Scheme = Scheme.EXACT
    dtype: str = "float32"
    format: str = ""
    outliers: bool = False
    four_over_six: bool = False

    @staticmethod
    def parse(text: str) -> Activation:
        """Read an activation's text; the inverse of ``str``.

        Raises
        ------
        FormatError
            The text is none; the message lists what is.
        """
        if text in ("float32", "float16"):
            return Activation(dtype=text)
        if text == Scheme.E4M3.value:
            return E4M3
        kind, colon, name = text.partition(":")
        if not colon and kind.removesuffix(_OUTLIERS) == Scheme.INTEGER.value:
            return Activation(Scheme.INTEGER, outliers=kind.endswith(_OUTLIERS))
        if name and kind == Scheme.ROUNDED.value:
            return rounded(name)
        if name and kind == Scheme.FOUR_BIT.value:
            joined = name.endswith(_OUTLIERS)
            name = name.removesuffix(_OUTLIERS)
            made = four_bit(name.removesuffix(_FOUR_OVER_SIX), name.endswith(_FOUR_OVER_SIX))
            return replace(made, outliers=joined)
        raise FormatError(
            f"unknown activations {text!r}; known are float32, float16, int8, int8-outliers, "
            "e4m3, fp4:FORMAT, fp4:FORMAT+46, these two with -outliers, and fake:FORMAT"
        )

    def __str__(self) -> str:
        if self.scheme is Scheme.EXACT:
            return self.dtype
        second = _OUTLIERS if self.outliers else ""
        if self.scheme is Scheme.INTEGER:
            return self.scheme.value + second
        if self.scheme is Scheme.E4M3:
            return self.scheme.value
        better = _FOUR_OVER_SIX if self.four_over_six else ""
        return f"{self.scheme.value}:{self.format}{better}{second}"

    @property
    def name(self) -> str:
        """The text with what names of functions cannot hold replaced."""
        return "".join(c if c.isalnum() else "_" for c in str(self))

    @property
    def exact(self) -> bool:
        """Whether x is read as it is."""
        return self.scheme is Scheme.EXACT

    @property
    def integer(self) -> bool:
        """Whether x is int8 codes with one scale a group, as int8 kernels read them."""
        return self.scheme is Scheme.INTEGER or (self.scheme is Scheme.FOUR_BIT and self.outliers)

    @property
    def fmt(self) -> Format:
        """The format of four-bit activations, with its choice of scales."""
        from amx_tvm import formats
        from amx_tvm.formats.four_over_six import four_over_six

        found = formats.get(self.format)
        return four_over_six(found) if self.four_over_six else found

    @property
    def group(self) -> int:
        """Columns of x under one scale."""
        return self.fmt.group_size if self.scheme is Scheme.FOUR_BIT else GROUP

    def computed_in(self, dtype: str) -> Activation:
        """Return what kernels on x of a type compute this as.

        float32 (CPUs): groups of int8 codes that hold outliers get their second bytes. float16
        (CUDA): four-bit codes become the values that they stand for, and int8, which would save
        nothing, x itself. E4M3 is int8 on CPUs.
        """
        if self.exact:
            return self
        if self.scheme is Scheme.E4M3:
            return self if dtype == "float16" else OUTLIERS
        if dtype == "float32":
            return replace(self, outliers=self.integer)
        return rounded(self.format) if self.scheme is Scheme.FOUR_BIT else FLOAT16

    def buffers(self, k: int, sums: bool) -> Buffers:
        """List the tensors of activations of ``k`` columns as (name, shape after M, dtype).

        INTEGER has one array of codes with one scale a group of 32. With outliers there is a
        second byte in the groups that ``outliers`` lists (how many, then which): x = scale *
        (codes + codes_low / 256) there and scale * codes elsewhere. FOUR_BIT has the same with
        ``outliers`` (kernels/cpu/fp4_integers.py), else one array of codes for each term of the
        format (amxfp4: the values of either sign, apart), code = table[c] - offset as int8, and
        float32 scales that contain the term's factor, one a group of the format. ``sums`` adds
        those of the codes under one scale. E4M3 has bytes in the order of the products
        (columns c and c + 8 of 16 take turns) and a scale a row.
        """
        if self.exact:
            return (("x", (k,), self.dtype),)
        if self.scheme is Scheme.ROUNDED:
            return (("x", (k,), "float16"),)
        if self.scheme is Scheme.E4M3:
            return (("x_codes", (k,), "uint8"), ("x_scales", (), "float32"))
        groups = -(-k // GROUP)
        count = 1 if self.integer else len(self.fmt.terms)
        names = ("",) if count == 1 else tuple(f"_{i}" for i in range(count))
        words = ("", "_low") if self.outliers else names
        scales = groups * (GROUP // self.group)
        return (
            *((f"codes{n}", (groups * GROUP,), "int8") for n in words),
            *((f"scales{n}", (scales,), "float32") for n in names),
            *((f"sums{n}", (scales,), "int32") for n in words if sums),
            *((("outliers", (1 + groups,), "int32"),) if self.outliers else ()),
        )


def four_bit(name: str, four_over_six: bool = False) -> Activation:
    """Return activations in a four-bit format."""
    return Activation(Scheme.FOUR_BIT, format=name, four_over_six=four_over_six)


def rounded(name: str) -> Activation:
    """Return activations rounded to a four-bit format and held in float16."""
    return Activation(Scheme.ROUNDED, dtype="float16", format=name)


FLOAT32 = Activation()
FLOAT16 = Activation(dtype="float16")
INT8 = Activation(Scheme.INTEGER)
OUTLIERS = Activation(Scheme.INTEGER, outliers=True)
E4M3 = Activation(Scheme.E4M3)
