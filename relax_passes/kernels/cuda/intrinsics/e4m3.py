# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""W as E4M3 in registers: codes of four bits look their bytes up, scales included.

A weight's table (amx_tvm/formats/e4m3.py) has eight bytes for each stored scale: the E4M3 numbers
of the eight magnitudes times that scale. It lies in shared memory twice, the second time with the
sign. `prmt` takes four codes of a word as selectors and so looks four of them up at once:

    selectors   the word's magnitudes, four nibbles at a time
    two scales  one lookup a sign, and the codes' signs, spread over bytes, choose
    one scale   the codes' signs, moved to the top of bytes, are put on

Words of two steps of 16 columns (layout "cuda-fragment-e4m3": a byte of a word is of one row) make
the four A registers of one wgmma of 32 columns of E4M3. Position 16 s + 4 t + 2 e + kh of the
operand is column 16 s + 2 t + 8 kh + e: x has the same order (formats/e4m3.py, `interleaved`).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from amx_tvm.formats.e4m3 import ENTRIES

from .arithmetic import BYTE
from .base import Intrinsic
from .decode import FragmentDecode
from .memory import LOAD_SHARED

TABLE_BYTES = 2 * ENTRIES * 8  # in shared memory


# The table to shared memory, twice.
FILL_TABLE = Intrinsic(
    "amx_fill_table",
    f"""
  for (int i = tid; i < {2 * ENTRIES}; i += threads) {{
    const unsigned v = ((const unsigned*)table)[i];
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(dst + 4 * i), "r"(v) : "memory");
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(dst + {ENTRIES * 8} + 4 * i), "r"(v | 0x80808080u) : "memory");
  }}""",
    signature="void(unsigned dst, const void* table, int tid, int threads)",
)


def _permute(a: np.ndarray, b: np.ndarray, selectors: np.ndarray | int) -> np.ndarray:
    """What `prmt` gives: byte j is that of (a, b) which nibble j selects, or its sign's spread."""
    both = np.stack([a, b], -1).astype(np.uint32).view(np.uint8)
    out = np.zeros(np.broadcast(a, selectors).shape, np.uint32)
    for j in range(4):
        nibble = np.asarray(selectors, np.uint32) >> np.uint32(4 * j) & np.uint32(15)
        index = np.broadcast_to((nibble & np.uint32(7)).astype(np.int64), out.shape)
        byte = np.take_along_axis(both, index[..., None], -1)[..., 0].astype(np.uint32)
        spread = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
        out |= np.where(nibble & 8, spread, byte) << np.uint32(8 * j)
    return out


PERMUTE = Intrinsic(
    "amx_permute",
    """
  unsigned d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selectors));
  return d;""",
    signature="unsigned(unsigned a, unsigned b, unsigned selectors)",
    meaning=_permute,
)


def entry_words(decode: FragmentDecode) -> int:
    """Words of the table that a lane holds for a step of 32 columns."""
    return 4 * len(decode.shape.scale_types) * (32 // decode.shape.group)


@cache
def load_entries(decode: FragmentDecode) -> Intrinsic:
    """Look the scales of a step's 32 columns up: entries [half][row h][scale], two words each."""
    shape, lines = decode.shape, []
    for i in range(entry_words(decode) // 2):
        scale = i % len(shape.scale_types)
        place = (
            f"table + {ENTRIES * 8 * scale} + 8 * amx_byte(rec, {shape.record // 2} * STEP + {i})"
        )
        lines.append(f"  amx_lds2(e + {2 * i}, {place});")

    def meaning(step: int, rec: np.ndarray, table: np.ndarray) -> np.ndarray:
        stored = np.ascontiguousarray(rec).view(np.uint8)
        words = np.ascontiguousarray(table).view(np.uint32).reshape(ENTRIES, 2)
        first, count = shape.record // 2 * step, entry_words(decode) // 2
        return words[stored[..., first : first + count]].reshape(*rec.shape[:-1], 2 * count)

    return Intrinsic(
        f"amx_entries_{decode.ident}",
        "\n".join(lines),
        (BYTE, LOAD_SHARED[2]),
        "void(unsigned* e, const unsigned* rec, unsigned table)",
        "int STEP",
        meaning,
    )


@cache
def decode_bytes(decode: FragmentDecode) -> Intrinsic:
    """Decode 32 columns of a stage, STEP of them before, into 4 A registers of E4M3."""
    scales, groups = len(decode.shape.scale_types), 32 // decode.shape.group
    lines = ["  const unsigned* v = w + 2 * STEP;"]
    for h in range(2):
        rows = 0x7531 if h else 0x6420
        lines.append(f"  {{\n    const unsigned s = amx_permute(v[0], v[1], {rows}u);")
        lines.append("    const unsigned s4 = s << 4, t = s & 0x77777777u;")
        for half in range(2):
            first = 2 * scales * (h + 2 * (half * groups // 2))
            selectors, signs = ("t >> 16", 0xBFAE) if half else ("t", 0x9D8C)
            found = f"amx_permute(e[{first}], e[{first + 1}], {selectors})"
            if scales == 2:
                other = f"amx_permute(e[{first + 2}], e[{first + 3}], {selectors})"
                lines.append(f"""    {{
      const unsigned negative = amx_permute(s, s4, {signs}u), p = {found};
      a[{2 * half + h}] = (negative & {other}) | (~negative & p);
    }}""")
            else:
                moved = f"amx_permute(s, s4, {signs & 0x7777}u)"
                lines.append(f"    a[{2 * half + h}] = {found} | ({moved} & 0x80808080u);")
        lines.append("  }")

    def meaning(step: int, w: np.ndarray, e: np.ndarray) -> np.ndarray:
        out = np.zeros((*w.shape[:-1], 4), np.uint32)
        for h in range(2):
            s = _permute(w[..., 2 * step], w[..., 2 * step + 1], 0x7531 if h else 0x6420)
            for half in range(2):
                first = 2 * scales * (h + 2 * (half * groups // 2))
                selectors = (s & np.uint32(0x77777777)) >> np.uint32(16 * half)
                negative = _permute(s, s << np.uint32(4), 0xBFAE if half else 0x9D8C)
                chosen = _permute(e[..., first], e[..., first + 1], selectors)
                if scales == 2:
                    other = _permute(e[..., first + 2], e[..., first + 3], selectors)
                    chosen = (negative & other) | (~negative & chosen)
                out[..., 2 * half + h] = chosen | (negative & np.uint32(0x80808080))
        return out

    return Intrinsic(
        f"amx_bytes_{decode.ident}",
        "\n".join(lines),
        (PERMUTE,),
        "void(unsigned* a, const unsigned* w, const unsigned* e)",
        "int STEP",
        meaning,
    )
