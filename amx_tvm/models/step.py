"""One forward pass as layers see it: the KV cache, positions, rotary tables; and attention.

On CUDA the kernels of ``relax_passes.kernels.cuda.attention`` rotate, store and attend; on other
targets, and for shapes that those kernels do not take, the cache object's own functions do.
"""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.target import Target

from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.kv_cache import PagedKVCache, cuda_attention, head_channels
from amx_tvm.models.rope import rotation
from amx_tvm.models.rotary import Tables, tables, tables_by_length
from relax_passes.kernels.cuda.attention import cache as cuda_cache
from relax_passes.kernels.cuda.attention import kernels


class Step:
    """What layers share during one pass over a number of tokens.

    Parameters
    ----------
    config : DecoderConfig
        The model's shape.
    cache : PagedKVCache
        The function's cache.
    state : Tensor or None
        What the kernels of CUDA targets need of the cache.
    tokens : PrimExpr or int
        Rows of the hidden states.
    decoding : bool
        Whether every row belongs to a sequence of its own.
    """

    def __init__(
        self,
        config: DecoderConfig,
        cache: PagedKVCache,
        state: Tensor | None,
        tokens: Any,
        decoding: bool = False,
    ) -> None:
        self.state = state
        self.config, self.cache, self.tokens, self.decoding = config, cache, tokens, decoding
        self.cuda = cuda_attention(config)
        self.token: Tensor | None = None
        self.long: Tensor | None = None  # 1 for tokens of long sequences, where longrope asks
        self._positions: Tensor | None = None
        self._tables: list[tuple[Any, Tables]] = []

    def begin(self) -> None:
        """Tell attention kernels where this pass's pages are."""
        if self.cuda is not None:
            self.token = cuda_cache.begin(self.cache, self.tokens)

    def positions(self) -> Tensor:
        """Return each token's position in its sequence, int32 [tokens]."""
        if self._positions is None:
            self._positions = self.cache.get_query_positions(self.tokens)
        return self._positions

    def rope(self, layer: int) -> Tables | None:
        """Return a layer's cosines and sines; None where attention or nobody rotates."""
        if self.cuda is not None or not (self.config.layer_ropes or self.long is not None):
            return None
        wanted = rotation(self.config, layer)
        if not wanted.pairs:
            return None
        for known, made in self._tables:
            if known == wanted:
                return made
        if self.long is not None:
            other = rotation(self.config, layer, self.config.context_length)
            made = tables_by_length(self.positions(), self.long, wanted, other)
        else:
            made = tables(self.positions(), wanted)
        self._tables.append((wanted, made))
        return self._tables[-1][1]


def attend(step: Step, layer: int, qkv: Tensor) -> Tensor:
    """Append keys and values to the cache and attend.

    Parameters
    ----------
    step : Step
        The pass.
    layer : int
        Which layer's pages.
    qkv : Tensor
        [tokens, heads + 2 kv, d].

    Returns
    -------
    Tensor
        [tokens, heads, d].
    """
    config, (tokens, _, d) = step.config, qkv.shape
    if step.cuda is not None:
        return _attend_cuda(step, layer, qkv)
    scale = config.attention_scale
    if config.slides(layer) and Target.current(allow_none=False).kind.name == "llvm":
        scale = -scale  # how the CPU kernels are told of a sliding layer
    dtype = config.cache_dtype or qkv.dtype  # the runtime takes the cache's type only
    stored = head_channels(config)
    given = _converted(_padded(qkv, stored), dtype)
    call = relax.call_dps_packed(
        "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
        [step.cache._expr, relax.prim_value(layer), relax.prim_value(scale), given._expr],
        out_ty=relax.TensorType((tokens, config.num_heads, stored), dtype),
    )
    out = Tensor(_expr=relax.BlockBuilder.current().emit(call))
    out = _converted(out, qkv.dtype)
    return out if stored == d else op.tensor_expr_op(_first_channels(d), "unpad_heads", [out])


def _padded(x: Tensor, channels: int) -> Tensor:
    """Append zeros to the heads of [tokens, heads, d]: they change no score and no result."""
    d = int(x.shape[2])
    if channels == d:
        return x

    def build(value: te.Tensor) -> te.Tensor:
        def at(t, h, i):  # noqa: ANN001, ANN202
            zero = tirx.const(0, value.dtype)
            return tirx.if_then_else(i < d, value[t, h, tirx.min(i, d - 1)], zero)

        return te.compute((value.shape[0], value.shape[1], channels), at, "pad_heads")

    return op.tensor_expr_op(build, "pad_heads", [x])


def _first_channels(d: int) -> Any:
    def build(value: te.Tensor) -> te.Tensor:
        shape = (value.shape[0], value.shape[1], d)
        return te.compute(shape, lambda t, h, i: value[t, h, i], "unpad_heads")

    return build


def _converted(x: Tensor, dtype: str) -> Tensor:
    """Convert [tokens, heads, d] to the cache's type or back; passes fold this into neighbours."""
    return x if x.dtype == dtype else op.astype(x, dtype)


def _attend_cuda(step: Step, layer: int, qkv: Tensor) -> Tensor:
    """Call the kernels of a layer: one for decoding, two for a chunk of one sequence."""
    config, attention, token, state = step.config, step.cuda, step.token, step.state
    assert attention is not None and token is not None and state is not None
    tokens, _, d = qkv.shape
    scale = config.attention_scale
    window = config.sliding_window if config.slides(layer) else 0
    out = Tensor.placeholder((tokens, config.num_heads, d), qkv.dtype)
    turn, index = rotation(config, layer), tirx.const(layer, "int64")
    if step.decoding:
        m = int(tokens) if isinstance(tokens, int) else None
        function = kernels.decode(attention, turn, scale, window, m)
        return op.tensor_ir_op(function, "attention_decode", [qkv, token, state, index], out)
    function = kernels.store(attention, turn)
    q = op.tensor_ir_op(function, "attention_store", [qkv, token, state, index], out)
    function = kernels.prefill(attention, scale, window)
    return op.tensor_ir_op(function, "attention_prefill", [q, token, state, index], out)
