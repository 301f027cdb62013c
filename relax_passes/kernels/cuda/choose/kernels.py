# ruff: noqa: E501 - CUDA text keeps its own line breaks
"""TensorIR of the kernels that choose tokens; their work is CUDA text.

    choose   logits [m, vocab], options, tables -> tokens [ROWS] of the first m rows, and
             log-probabilities of those that ask for them

They allocate nothing and have a grid that depends on m alone, so a CUDA graph can hold them. `amx_tvm.runtime.choices` packs the options and says what the tables hold.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from amx_tvm.runtime.choices import ROWS, WORDS
from amx_tvm.runtime.options import MOST_LOGPROBS
from amx_tvm.targets.cuda.gpus import gpu
from relax_passes.kernels.cuda.intrinsics.base import Intrinsic, at
from relax_passes.kernels.cuda.intrinsics.sync import CLUSTER_SYNC

from .row_text import ROW
from .team_text import BINS

SPLITS = 8  # blocks of a row where there are clusters
THREADS = BINS  # of a block
_DEPENDENT = "tirx.use_programtic_dependent_launch"  # TVM 0.27's own spelling


def _function(name: str, body: Callable[[], None], dependent: bool = False) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            attrs: dict = {"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8}
            if dependent:
                attrs["tirx.kernel_launch_params"] = [_DEPENDENT]
            T.func_attr(attrs)
            body()
    return builder.get().without_attr("global_symbol")


def _int32(name: str, *shape: int) -> tirx.Buffer:
    return T.arg(name, T.Buffer(shape, "int32"))


def _logits(vocab: int) -> tuple[tirx.Expr, tirx.Buffer]:
    rows = tirx.Var("m", "int64")
    return tirx.Cast("int32", rows), T.arg("logits", T.Buffer((rows, vocab), "float32"))


def _start(buffer: tirx.Buffer) -> tirx.Expr:
    return at(buffer, *[tirx.const(0, "int32")] * len(buffer.shape))


def _floats(vocab: int, splits: int) -> int:
    """Shared memory of a block: AmxTeamTable and, where there are clusters, its logits."""
    table = 16 * 2 * splits + 32 * (3 * 8 + 4) + 4 * 4 * BINS + 8 + 8 * MOST_LOGPROBS
    chunk = -(-vocab // (4 * splits * THREADS)) * 4 * THREADS
    return table // 4 + (chunk if splits > 1 else 0)


def _shared(floats: int) -> tirx.Buffer:
    """Dynamic shared memory; a store to a last element, used by nobody, keeps its size."""
    shared = T.sblock_alloc_buffer((floats + 1,), "float32", scope="shared.dyn")
    T.buffer_store(shared, tirx.const(0.0, "float32"), [floats])
    return shared


def _teams(name: str, rows: tirx.Expr, splits: int, emit: Callable) -> None:
    """Emit a grid of a team for each row."""
    bindings = [
        T.thread_binding(rows, thread="blockIdx.y"),
        T.thread_binding(splits, thread="blockIdx.x"),
        T.thread_binding(THREADS, thread="threadIdx.x"),
    ]
    if splits > 1:
        bindings.insert(2, T.thread_binding(splits, thread="clusterCtaIdx.x"))
    with T.frame_scope(bindings) as bound:
        with T.sblock(name):
            T.reads()
            T.writes()
            emit(bound[0], bound[1], bound[-1])


def tables(vocab: int) -> tuple[tuple[str, int], ...]:
    """Return the tables that options refer to, each with the length of a row (choices.py)."""
    return ("counts", vocab), ("masks", -(-vocab // 32)), ("biases", 2)


def choose(
    vocab: int,
    arch: str,
    *,
    dependent: bool = False,
) -> tirx.PrimFunc:
    """Build the kernel that chooses a token for each row.

    Arguments of the kernel, in order:

    ======= ======== =================== ================================================
    logits  float32  [m, vocab]          of the step; m at most ROWS
    options int32    [ROWS, WORDS]       `choices.pack`'s, uploaded before it
    counts  int32    [any, vocab]        one is added where a row with penalties chose
    masks   int32    [any, vocab / 32]
    biases  int32    [any, 2]
    tokens  int32    [ROWS]              out, the first m: a token, `choices.BROKEN` where logits
                                         hold NaN or infinity, `choices.NOTHING` where a mask
                                         leaves nothing; 0 where no request is
    ids     int32    [ROWS, MOST]        out, the most likely tokens of the logits as they were,
                                         best first, as many as the row's options say
    values  float32  [ROWS, 1 + MOST]    out, the chosen token's log-probability and theirs
    ======= ======== =================== ================================================

    MOST is `options.MOST_LOGPROBS`. Rows that ask for no log-probabilities, or have no token, leave
    `ids` and `values` alone. The next step's embedding must take max(token, 0). Where there are no
    clusters, rows with bias, penalties or masks are changed in place in `logits`, and no
    log-probabilities can be told of them; elsewhere logits stay.

    Parameters
    ----------
    vocab : int
        Tokens, at most 262144 where there are no clusters.
    arch : str
        Architecture, such as "sm_90a".
    dependent : bool
        Programmatic dependent launch (sm_90 and later).
    """
    splits = SPLITS if gpu(arch).clusters else 1
    floats, team = _floats(vocab, splits), f"{vocab}, {splits}, {THREADS}"
    meet = f"{CLUSTER_SYNC.name}();" if splits > 1 else "__syncthreads();"
    run = Intrinsic(
        f"amx_choose_{vocab}_{splits}_{int(dependent)}",
        f"""  static_assert(AmxTeam<{team}>::FLOATS == {floats}, "shared memory");
  amx_choose<{team}, {"true" if dependent else "false"}>(
      shared, logits, options, counts, masks, biases, tokens, row, rank, tid);
  const AmxChoice o = ((const AmxChoice*)options)[row];
  if (!(o.flags & AMX_LIVE) || o.logprobs < 0) return;
  {meet}  // the token is there, and the team has done with its shared memory
  amx_logprobs<{team}>(shared, logits, options, tokens, ids, values, row, rank, tid);""",
        (ROW,),
        "void(float* shared, void* logits, const void* options, void* counts, const void* masks, "
        "const void* biases, void* tokens, void* ids, void* values, int row, int rank, int tid)",
    )

    def body() -> None:
        rows, logits = _logits(vocab)
        given = (
            logits,
            _int32("options", ROWS, WORDS),
            *(_int32(name, tirx.Var(f"{name}_rows", "int64"), n) for name, n in tables(vocab)),
            _int32("tokens", ROWS),
            _int32("ids", ROWS, MOST_LOGPROBS),
            T.arg("values", T.Buffer((ROWS, 1 + MOST_LOGPROBS), "float32")),
        )

        def emit(row, rank, tid) -> None:  # noqa: ANN001
            shared = _start(_shared(floats))
            run(shared, *map(_start, given), row, rank, tid)

        _teams("choose", rows, splits, emit)

    return _function("choose", body, dependent)
