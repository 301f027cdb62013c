# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""Attention without a cache as TensorIR functions; the CUDA text of its blocks is in `dense_text`.

turn       qkv [m, heads + 2 kv, d], positions int32 [m] -> the same, queries and keys turned
texts      qkv, bounds int32 [texts + 1] -> out [m, heads, d]; rows of whole texts
examples   q, k, v, bias, out [b, s, heads, d]; rows of each of b examples
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from amx_tvm.targets.cuda.gpus import gpu
from relax_passes.attention_spec import AttentionSpec
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, at

from .config import MOST_CHANNELS, frequencies
from .dense_text import ATTEND_EXAMPLE, ATTEND_TEXTS, QUERIES, shared_floats
from .kernels import function, kernel_of, log2_scale
from .state_text import STATE

LOG2E = 1.4426950408889634
_WARPS = 4


def fits(head_dim: int) -> bool:
    """Whether the kernels take heads of a size: rows of whole 16-byte pieces."""
    return head_dim % 8 == 0 and head_dim <= MOST_CHANNELS


def _sizes(head_dim: int, arch: str) -> tuple[int, int]:
    """Return the channels in shared memory, and the keys of a tile."""
    d, limit = -(-head_dim // 16) * 16, gpu(arch).shared_bytes
    tokens = next(n for n in (64, 32, 16) if shared_floats(d, n) * 4 + 64 <= limit)
    return d, min(tokens, 64 if d <= 128 else 32)


def _half(name: str, *shape: Any) -> tirx.Buffer:
    return T.arg(name, T.Buffer(shape, "float16"))


def _blocks(x: Any, y: Any, z: Any) -> list:
    threads = [T.thread_binding(x, thread="blockIdx.x"), T.thread_binding(y, thread="blockIdx.y")]
    threads += [T.thread_binding(z, thread="blockIdx.z")] if z is not None else []
    threads.append(T.thread_binding(_WARPS, thread="threadIdx.y"))
    return [*threads, T.thread_binding(32, thread="threadIdx.x")]


def turn(spec: AttentionSpec) -> tirx.PrimFunc:
    """Build the kernel that turns queries and keys by their positions; values are copied."""
    turns, heads, d = frequencies(spec.rotation), spec.heads + 2 * spec.kv_heads, spec.head_dim
    put = Intrinsic(
        f"amx_turn_row_{turns.name}_{heads}_{spec.kv_heads}_{d}",
        f"""
  const half* from = (const half*)x + (long long)row * {heads * d};
  half* to = (half*)y + (long long)row * {heads * d};
  for (int i = thread; i < {heads * d}; i += 128) {{
    const int head = i / {d}, e = i % {d};
    half value = from[i];
    if (head < {heads - spec.kv_heads} && e < {2 * spec.rotation.pairs}) {{
      const bool low = e < {spec.rotation.pairs};
      const int f = low ? e : e - {spec.rotation.pairs};
      const float2 turn = amx_turn(position, {turns.name}[f], {spec.rotation.factor!r}f);
      const float mine = __half2float(value), other = __half2float(from[low ? i + {spec.rotation.pairs} : i - {spec.rotation.pairs}]);
      value = __float2half_rn(low ? mine * turn.x - other * turn.y : mine * turn.x + other * turn.y);
    }}
    to[i] = value;
  }}""",
        (STATE, turns),
        "void(const void* x, int position, void* y, int row, int thread)",
    )

    def body() -> None:
        rows = tirx.Var("m", "int64")
        x = _half("qkv", rows, heads, d)
        positions = T.arg("positions", T.Buffer((rows,), "int32"))
        y = _half("turned", rows, heads, d)
        threads = [T.thread_binding(rows, thread="blockIdx.x")]
        threads.append(T.thread_binding(128, thread="threadIdx.x"))
        with T.frame_scope(threads) as (row, thread):
            with T.sblock("turn"):
                T.reads()
                T.writes()
                zero, place = tirx.const(0, "int32"), tirx.Cast("int32", row)
                put(at(x, zero, zero, zero), positions[row], at(y, zero, zero, zero), place, thread)

    return function("turn_heads", body)


def texts(spec: AttentionSpec, causal: bool, arch: str) -> tirx.PrimFunc:
    """Build the attention of rows to rows of their own text.

    Parameters
    ----------
    spec : AttentionSpec
        What is computed, of rows that have been turned; keys less than ``window`` rows away are
        seen.
    causal : bool
        Whether rows see no later ones.
    arch : str
        Architecture, such as "sm_90a".
    """
    d, tokens = _sizes(spec.head_dim, arch)
    attend = ATTEND_TEXTS[d, spec.head_dim, spec.heads, spec.kv_heads, tokens, causal]

    def body() -> None:
        rows, ends = tirx.Var("m", "int64"), tirx.Var("ends", "int64")
        qkv = _half("qkv", rows, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        bounds = T.arg("bounds", T.Buffer((ends,), "int32"))
        out = _half("out", rows, spec.heads, spec.head_dim)
        # every text may leave one tile unfilled
        count = tirx.Cast("int32", rows) // QUERIES + tirx.Cast("int32", ends)
        zero = tirx.const(0, "int32")

        def one(shared: Any, block: Any, head: Any, warp: Any, lane: Any) -> None:
            attend(
                shared,
                at(qkv, zero, zero, zero),
                at(bounds, zero),
                at(out, zero, zero, zero),
                tirx.Cast("int32", ends) - 1,
                tirx.const(log2_scale(spec), "float32"),
                tirx.const(spec.soft_cap, "float32"),
                tirx.const(spec.window, "int32"),
                block,
                head,
                warp,
                lane,
            )

        kernel_of(_blocks(count, spec.heads, None), shared_floats(d, tokens), one)

    return function("attention_texts", body)


@dataclass(frozen=True)
class Place:
    """Where an element [example, row, head] begins in a tensor that is read as one line."""

    offset: Any
    example: Any
    row: Any
    head: Any

    def numbers(self, change: Callable[[Any], Any]) -> Place:
        """Return the same with every number changed."""
        return Place(*(change(x) for x in (self.offset, self.example, self.row, self.head)))

    def __call__(self, example: Any, head: Any) -> Any:
        """Return where the rows of a head of an example begin."""
        wide = tirx.Cast("int64", example) * self.example + tirx.Cast("int64", head) * self.head
        return wide + self.offset


@dataclass(frozen=True)
class Examples:
    """Attention of a number of examples: sizes, and where its inputs are.

    Parameters
    ----------
    shape : tuple
        Examples, queries, heads, channels; the first two may be variables.
    keys : expression
        Of the same variables, or a number.
    kv_heads : int
        Heads of k and v.
    scale : float
        Factor on q k^T.
    causal : bool
        Whether query i sees keys 0 to i alone.
    q, k, v : Place
        Steps between rows and heads, in elements.
    bias : Place or None
        Of what is added to the scores [example, query, head or 0, key].
    """

    shape: tuple
    keys: Any
    kv_heads: int
    scale: float
    causal: bool
    q: Place
    k: Place
    v: Place
    bias: Place | None


def examples(asked: Examples, arch: str) -> tirx.PrimFunc:
    """Build the attention of examples: q, k, v, [bias], each read as one line, then the result."""
    count, rows, heads, channels = asked.shape
    d, tokens = _sizes(channels, arch)
    attend = ATTEND_EXAMPLE[d, channels, tokens, asked.bias is not None, asked.causal]
    given = [x for x in (count, rows) if isinstance(x, tirx.Var)]
    own = [tirx.Var(x.name, "int64") for x in given]

    def mine(x: Any) -> Any:
        if isinstance(x, int):
            return x
        return tirx.IndexMap(given, [x], None).map_indices(own)[0]

    def narrow(x: Any) -> Any:
        return tirx.Cast("int32", mine(x)) if isinstance(x, tirx.Expr) else tirx.const(x, "int32")

    def body() -> None:
        places = [("q", asked.q), ("k", asked.k), ("v", asked.v)]
        places += [("bias", asked.bias)] if asked.bias is not None else []
        lines = {n: (_half(n, tirx.Var(f"{n}_size", "int64")), p.numbers(mine)) for n, p in places}
        out = _half("out", mine(count), mine(rows), heads, channels)
        zero, none = tirx.const(0, "int32"), tirx.reinterpret("handle", tirx.const(0, "uint64"))

        def one(shared: Any, tile: Any, head: Any, example: Any, warp: Any, lane: Any) -> None:
            of = {"k": head // (heads // asked.kv_heads), "v": head // (heads // asked.kv_heads)}
            begins = [at(b, p(example, of.get(n, head))) for n, (b, p) in lines.items()]
            begins += [none] if asked.bias is None else []
            bias_step = narrow(asked.bias.row) if asked.bias is not None else zero
            attend(
                shared,
                *begins,
                at(out, example, zero, head, zero),
                *(narrow(p.row) for p in (asked.q, asked.k, asked.v)),
                tirx.const(heads * channels, "int32"),
                bias_step,
                narrow(rows),
                narrow(asked.keys),
                tile,
                tirx.const(asked.scale * LOG2E, "float32"),
                warp,
                lane,
            )

        tiles = (narrow(rows) + QUERIES - 1) // QUERIES
        kernel_of(_blocks(tiles, heads, narrow(count)), shared_floats(d, tokens), one)

    return function("attention_examples", body)
