# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Rounding keys and values to pages, in TensorIR: bit for bit what ``amx_tvm.formats`` stores.

A thread has eight channels of a token, four threads a group of 32. What a scale is and which code is
nearest are the rules of ``rows/rounding.py``; words are those of codes_text. Tokens are rounded when
they leave the newest: in front of a step those of all layers that it pushes out (`leave`), in a chunk
those of its own rows that are not among the newest behind it (`round_rows`).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from amx_tvm.formats import scales
from amx_tvm.formats.int8 import BYTE_OFFSET, LARGEST
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, at, hold, local
from relax_passes.kernels.cuda.rows import rounding as r
from relax_passes.kernels.cuda.rows.block import PIECE, over_lanes

from .layout import Layout
from .state_text import STATE

_SIZE_BITS, _SIGN_BITS = (9, 1, 12, 4), (15, 7, 8, 0)  # of every second code in its half
_BYTES = (0, 2, 1, 3)  # of four codes of eight bits in their word
WARPS = 4

_FIRST_LEAVING = Intrinsic(
    "amx_first_leaving",
    """
  const AmxPacked* s = (const AmxPacked*)state;
  return s->told[0] > b ? amx_rounded_before(s, amx_sequences(s)[b]) : 0;""",
    (STATE,),
    "int(const void* state, int b)",
)
_LEAVING = Intrinsic(
    "amx_leaving",
    """
  if (((const AmxPacked*)state)->told[0] <= b) return 0;
  const AmxSequence s = amx_sequences((const AmxPacked*)state)[b];
  return max(0, min(s.before, s.before + s.rows - NEWEST) - amx_rounded_before((const AmxPacked*)state, s));""",
    (STATE,),
    "int(const void* state, int b)",
    "int NEWEST",
)
# Eight channels of a token in 16 bits.
_RECALL = Intrinsic(
    "amx_recall",
    """
  const AmxPacked* state = (const AmxPacked*)state_;
  const AmxRecent<D, NEWEST, FIRST, LAYERS, KV> recent(state, amx_sequences(state)[b].place, index / KV, index % KV);
#pragma unroll
  for (int e = 0; e < 8; ++e)
    out[e] = __half2float(value ? *recent.value(position, 8 * c + e) : *recent.key(position, 8 * c + e));""",
    (STATE,),
    "void(float* out, const void* state_, int b, int index, int position, bool value, int c)",
    "int D, int NEWEST, int FIRST, int LAYERS, int KV",
)
# Eight channels of a row of a chunk, where they are to be rounded; the position, or -1.
_ROW = Intrinsic(
    "amx_row_to_round",
    """
  const AmxPacked* state = (const AmxPacked*)state_;
  const half* x = (const half*)(value ? v : k) + ((long long)row * KV + kv) * D + 8 * c;
#pragma unroll
  for (int e = 0; e < 8; ++e) out[e] = __half2float(x[e]);
  const int position = amx_rows(state)[row];
  const AmxSequence s = amx_sequences(state)[amx_rows(state)[rows + row]];
  return position < s.before + s.rows - NEWEST ? position : -1;""",
    (STATE,),
    "int(float* out, const void* state_, const void* k, const void* v, int row, int rows, int kv, bool value, int c)",
    "int D, int NEWEST, int KV",
)
_SEQUENCE_OF = Intrinsic(
    "amx_sequence_of",
    "  return amx_rows((const AmxPacked*)state)[rows + row];",
    (STATE,),
    "int(const void* state, int rows, int row)",
)
# Codes of eight channels to a page, and the scales of BYTES bytes of every LANES-th thread.
_PUT = Intrinsic(
    "amx_put",
    """
  typedef AmxPanelBytes<F, D> At;
  const AmxPacked* state = (const AmxPacked*)state_;
  const AmxPanels<F, D, LAYERS, KV> panels(state, amx_sequences(state)[b].table, index / KV, index % KV);
  unsigned char* panel = panels(position >> 4);
  const int token = position & 15;
  unsigned* codes = (unsigned*)(panel + (value ? At::VALUES : 0) + token * At::ROW) + (value ? At::value_word(c) : At::key_word(c));
  codes[0] = w0;
  if (F::WORDS == 2) codes[1] = w1;
  if (c % LANES != 0) return;
  unsigned char* to = panel + (value ? At::VALUE_SCALES : At::KEY_SCALES) + token * At::SCALES + c / LANES * BYTES;
  if (BYTES == 1) *to = (unsigned char)scale;
  else *(unsigned short*)to = (unsigned short)scale;""",
    (STATE,),
    "void(const void* state_, int b, int index, int position, bool value, int c, unsigned w0, unsigned w1, int scale)",
    "class F, int D, int LAYERS, int KV, int BYTES, int LANES",
)


def _f(value: float) -> tirx.Expr:
    return tirx.const(value, "float32")


def leave(layout: Layout, state: Any, row: Any, block: Any, warp: Any, lane: Any) -> None:
    """Round what leaves a sequence's newest tokens in one layer and head: a warp."""
    spec, pieces = layout.spec, layout.head_dim // PIECE
    index = hold(block * WARPS + warp)
    first = hold(_FIRST_LEAVING(state, row))
    total = hold(_LEAVING[spec.newest](state, row) * (2 * pieces))
    inside = index < layout.layers * layout.kv_heads
    values = local(PIECE)
    with T.serial(0, tirx.Select(inside, (total + 31) // 32, tirx.const(0, "int32"))) as i:
        item = hold(i * 32 + lane)
        mine = hold(tirx.min(item, total - 1))
        c, value = hold(mine % pieces), hold(tirx.Cast("int32", mine // pieces % 2))
        position = hold(first + mine // (2 * pieces))
        numbers = (layout.head_dim, spec.newest, spec.first, layout.layers, layout.kv_heads)
        place = (row, index, position, tirx.Cast("bool", value), c)
        _RECALL[numbers](at(values, 0), state, *place)
        words, scale = encoded(layout, values)
        with T.If(item < total), T.Then():
            _put(layout, state, place, words, scale)


def round_rows(
    layout: Layout, state: Any, k: Any, v: Any, layer: Any, rows: Any, item: Any
) -> None:
    """Round eight channels of a chunk's row, if it is not one of the newest: a thread.

    Parameters
    ----------
    k, v : Expr
        Addresses of keys and values float16 [rows, kv_heads, d].
    item : Expr
        Number of the thread.
    """
    pieces, heads = layout.head_dim // PIECE, layout.kv_heads
    total = hold(rows * (heads * 2 * pieces))
    mine = hold(tirx.min(item, total - 1))
    c, value = hold(mine % pieces), tirx.Cast("bool", hold(mine // pieces % 2))
    kv, row = hold(mine // (2 * pieces) % heads), hold(mine // (2 * pieces * heads))
    values = local(PIECE)
    found = _ROW[layout.head_dim, layout.spec.newest, heads]
    position = hold(found(at(values, 0), state, k, v, row, rows, kv, value, c))
    words, scale = encoded(layout, values)
    with T.If(tirx.And(item < total, position >= 0)), T.Then():
        place = (_SEQUENCE_OF(state, rows, row), layer * heads + kv, position, value, c)
        _put(layout, state, place, words, scale)


def _put(layout: Layout, state: Any, place: tuple, words: list, scale: Any) -> None:
    wide = layout.format.code_bits == 8 or len(layout.format.scale_tensors) == 2
    numbers = (layout.kind, layout.head_dim, layout.layers, layout.kv_heads)
    _PUT[(*numbers, *((2, 4) if wide else (1, 2)))](state, *place, *words, scale)


def encoded(layout: Layout, values: tirx.Buffer) -> tuple[list, Any]:
    """Round the eight channels of each thread.

    Parameters
    ----------
    layout : Layout
        With the format.
    values : Buffer
        float32 [8], registers.

    Returns
    -------
    (list of Expr, Expr)
        Two words uint32 (the second 0 where codes have four bits) and the stored scales, int32.
    """
    mine = [hold(values[i]) for i in range(PIECE)]
    lanes = layout.format.group_size // PIECE
    return (_eight if layout.format.code_bits == 8 else _four)(layout.format, mine, lanes)


def _largest(numbers: list, lanes: int) -> Any:
    largest = _f(0.0)
    for number in numbers:
        largest = tirx.max(largest, number)
    return over_lanes(hold(largest), lanes, tirx.max)


def _divisor(scale: Any) -> Any:
    """What to divide by under a scale: infinity where it is 0, so that all becomes 0."""
    infinity = _f(float("inf"))
    return hold(tirx.Select(tirx.EQ(scale, _f(0.0)), infinity, scale))


def _error(parts: list, scale: Any, lanes: int) -> Any:
    """Squared error of magnitudes of a group under a scale."""
    divisor, total = _divisor(scale), _f(0.0)
    for part in parts:
        difference = hold(r.e2m1(hold(part / divisor)) * scale - part)
        total = hold(total + difference * difference)
    return over_lanes(total, lanes, lambda a, b: a + b)


def _scale(fmt: Any, parts: list, lanes: int) -> Any:
    """The better of the scales that make the largest magnitude 6 and 4, or the former."""
    largest = _largest(parts, lanes)
    six = hold(r.scale_of(fmt, largest, None))
    if not fmt.four_over_six:
        return six
    four = hold(r.scale_of(fmt, hold(largest * _f(1.5)), None))
    better = _error(parts, four, lanes) < _error(parts, six, lanes)
    return hold(tirx.Select(better, four, six))


def _four(fmt: Any, values: list, lanes: int) -> tuple[list, Any]:
    zero = _f(0.0)
    if len(fmt.scale_tensors) == 2:
        signed = [[hold(tirx.max(sign * v, zero)) for v in values] for sign in (_f(1.0), _f(-1.0))]
    else:
        signed = [[hold(tirx.abs(v)) for v in values]]
    found = [_scale(fmt, parts, lanes) for parts in signed]
    divisors = [_divisor(scale) for scale in found]
    word = tirx.const(0, "uint32")
    for j, value in enumerate(values):
        own = divisors[0] if len(divisors) == 1 else tirx.Select(value > zero, *divisors)
        index = r.e2m1_index(hold(tirx.abs(value) / hold(own)))
        minus = tirx.And(value < zero, index > 0)
        size, sign = (bits[j // 2] + 16 * (j % 2) for bits in (_SIZE_BITS, _SIGN_BITS))
        code = tirx.shift_left(tirx.Cast("uint32", index), tirx.const(size, "uint32"))
        bit = tirx.Select(minus, tirx.const(1 << sign, "uint32"), tirx.const(0, "uint32"))
        word = hold(word | code | bit)
    kind = fmt.rounding_of("the KV cache").type
    stored = [r.stored_byte(kind, scale) for scale in found]
    if len(stored) == 2:
        stored = [hold(stored[0] | tirx.shift_left(stored[1], tirx.const(8, "int32")))]
    return [word, tirx.const(0, "uint32")], stored[0]


def _eight(_fmt: Any, values: list, lanes: int) -> tuple[list, Any]:
    largest = _largest([tirx.abs(v) for v in values], lanes)
    step = hold(largest / _f(float(LARGEST)))
    half = tirx.Cast("float16", tirx.min(step, _f(65504.0)))
    stored = hold(tirx.Cast("int32", tirx.reinterpret("uint16", half)))
    bits = tirx.reinterpret("float16", tirx.Cast("uint16", stored))
    divisor = _divisor(hold(tirx.Cast("float32", bits)))
    words = [tirx.const(0, "uint32"), tirx.const(0, "uint32")]
    for j, value in enumerate(values):
        limit = _f(float(LARGEST))
        steps = hold(tirx.max(tirx.min(value / divisor, limit), -limit))
        # round_away of amx_tvm.formats.scales: nearest, ties away from zero
        nearest = float(scales.HALF)
        away = hold(steps + tirx.Select(steps < _f(0.0), _f(-nearest), _f(nearest)))
        code = tirx.Cast("uint32", tirx.Cast("int32", away) + BYTE_OFFSET)
        shift = tirx.const(8 * _BYTES[j % 4], "uint32")
        words[j // 4] = hold(words[j // 4] | tirx.shift_left(code, shift))
    return words, stored
