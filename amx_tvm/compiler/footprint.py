"""Will it fit: what compiling a model and running it take, known before any work begins.

Estimates by the shapes of the checkpoint's tensors, which are read from its headers alone. Disk is
what the parameters take; the exact size is known, and asked for, once the model is lowered.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from amx_tvm import formats
from amx_tvm.artifact.memory import available_memory
from amx_tvm.artifact.publication import bytes_text, free_bytes, room
from amx_tvm.cache_storage import cache_storage
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ArtifactError, ModelError, TargetError
from amx_tvm.frontends import ModelSource
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.registry import find
from amx_tvm.targets import ResolvedTarget
from relax_passes.kernels.cache_sizes import Sizes
from relax_passes.kernels.cpu.attention import PAGE_SIZE

COMPILER_BYTES = 350_000_000  # Python, TVM and the module; measured for SmolLM2-135M
COPIES = 2  # of the largest weight in float32 that rounding and packing hold at once
CONTEXT = 4096  # tokens that `load` makes room for by default
SURELY = 0.9  # of an estimate: what there is not even that much room for
_TOWER = ("vision", "connector", "projector")  # in the names of tensors of what sees


@dataclass(frozen=True)
class Footprint:
    """What a model takes, in bytes.

    Attributes
    ----------
    name : str
        Of the model.
    parameters : int
        On disk and, while it runs, in memory.
    largest : int
        The largest tensor in float32, one of which is in memory at a time.
    token : int
        Keys and values of a token of the context.
    context : int
        Tokens that a loaded model has room for by default.
    target : str
        The name by which another machine compiles for this one.
    """

    name: str
    parameters: int
    largest: int
    token: int
    context: int
    target: str

    @property
    def compiling(self) -> int:
        """Memory at the most while it is compiled."""
        return COMPILER_BYTES + COPIES * self.largest

    @property
    def running(self) -> int:
        """Memory while it runs, with a full context."""
        return self.parameters + self.context * self.token

    def __str__(self) -> str:
        full = f" with {self.context} tokens of context" if self.token else ""
        return (
            f"{self.name} takes about {bytes_text(self.parameters)} of disk, "
            f"{bytes_text(self.compiling)} of memory to compile and "
            f"{bytes_text(self.running)} to run{full}"
        )

    def require(self, place: Path) -> None:
        """Refuse to begin what surely does not fit on the disk or into memory.

        Parameters
        ----------
        place : Path
            Where the artifact will be.

        Raises
        ------
        ArtifactError, ModelError
            With what is needed and what there is.
        """
        parent = next(p for p in place.absolute().parents if p.exists())
        free = free_bytes(parent)
        if free < SURELY * self.parameters:
            raise ArtifactError(
                f"no space left: {self.name} needs about {bytes_text(self.parameters)}, and "
                f"{room(parent)}; free some space or choose another --output"
            )
        memory = available_memory(swap=True)
        if memory is not None and memory < COMPILER_BYTES / 2 + self.largest:
            raise ModelError(
                f"{self.name} needs about {bytes_text(self.compiling)} of memory to be compiled, "
                f"and {bytes_text(memory)} are available; end other programs, or compile on a "
                f"larger machine for --target {self.target}"
            )

    def require_device(self, memory: int, name: str) -> None:
        """Refuse a model whose parameters a GPU does not hold.

        Raises
        ------
        TargetError
            With both numbers.
        """
        if memory < SURELY * self.parameters:
            raise TargetError(
                f"{self.name} has {bytes_text(self.parameters)} of parameters, and {name} holds "
                f"{bytes_text(memory)}; take a smaller model or fewer bits"
            )


def footprint(
    source: ModelSource, config: QuantizationConfig, target: ResolvedTarget
) -> Footprint | None:
    """Estimate what a model takes; None for functions, whose weights are in memory already.

    Raises
    ------
    ModelError, TargetError
        As lowering does, for a configuration that cannot be followed.
    """
    if source.kind == "function":
        return None
    family = find(source.config, source.kind)
    plain = 32 if target.device == "cpu" else 16
    tied = bool(source.config.get("tie_word_embeddings"))
    names = [name for name in source.names() if not (tied and name == "lm_head.weight")]
    if family.vision is None:
        names = [name for name in names if not _of_tower(name)]
    shapes = {name: source.shape(name) for name in names}
    bits = sum(prod(shape) * _bits(name, shape, config, plain) for name, shape in shapes.items())
    largest = max((4 * _matrix(shape) for shape in shapes.values()), default=0)
    token, context = 0, 0
    if source.kind == "causal_lm":
        decoder = family.configure(source.config)
        token = _token_bytes(decoder, config, target)
        context = min(CONTEXT, decoder.context_length)
    cpu = target.key.rsplit("/", 1)[-1].partition("+")[0].partition("-")[0]
    there = target.key.replace("/", ":", 1) if target.device == "cuda" else f"llvm:{cpu}"
    return Footprint(source.name, int(bits) // 8, largest, token, context, there)


def _bits(name: str, shape: tuple[int, ...], config: QuantizationConfig, plain: int) -> float:
    """Return the stored bits of a tensor's values."""
    if len(shape) < 2 or name.endswith("bias"):
        return plain
    module = name.removesuffix(".weight")
    chosen = config.linear(f"vision.{module}" if _of_tower(name) else module).format
    return plain if chosen == "none" else formats.get(chosen).bits_per_value


def _of_tower(name: str) -> bool:
    return any(part in name for part in _TOWER)


def _matrix(shape: tuple[int, ...]) -> int:
    """Return the values that are read at once: of stacked experts one entry."""
    return prod(shape[1:] if len(shape) == 3 else shape)


def _token_bytes(decoder: DecoderConfig, config: QuantizationConfig, target: ResolvedTarget) -> int:
    storage = cache_storage(config, decoder, target)
    if storage.packed is not None:
        sizes = Sizes(storage.packed, decoder.num_layers, decoder.num_kv_heads, decoder.head_dim)
        return -(-sizes.page_bytes // PAGE_SIZE)
    element = 2 if storage.dtype == "float16" or target.device != "cpu" else 4
    return 2 * decoder.cached_layers * decoder.num_kv_heads * decoder.head_dim * element
