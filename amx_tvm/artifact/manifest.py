"""manifest.json: the description of an artifact, as dataclasses that read and write themselves.

The manifest is written last and names every other file with its size and SHA-256, so a directory
without one is not an artifact, and one with a manifest is complete. ``digest`` is the SHA-256 of
the manifest itself (canonical JSON without that key): an offset that changed by accident would
otherwise read the wrong weights.

Parts whose content belongs to others (the model's configuration, the quantization settings, the
list of linears) stay plain dictionaries; the keys that the runtime reads are required and checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np

from amx_tvm.artifact.cpu import missing_features
from amx_tvm.embedding import EmbeddingSettings
from amx_tvm.errors import ArtifactError
from amx_tvm.images import ImageSettings
from amx_tvm.schema import Count, FileName, Mismatch, OneOf, Range, Size, TokenId, conform
from amx_tvm.strict_json import read_json

SCHEMA = 4
FILE_NAME = "manifest.json"
KINDS = ("causal_lm", "function", "embedding")

_AGAIN = "compile the model again or copy the artifact anew"

# The dtypes of parameters: what NumPy, the runtime library and C++ know alike.
_DTYPES = tuple(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))
DType = Annotated[str, OneOf(("bool", *_DTYPES, "float16", "float32", "float64"))]
Checksum = Annotated[int, Range(0, 2**32 - 1)]


class _Shape(TypedDict):
    """The keys of the model's configuration that the runtime reads."""

    num_attention_heads: Count
    hidden_size: Count
    intermediate_size: Count


class _NeededOfModel(TypedDict):
    family: str
    name: str
    config: _Shape
    vocab_size: Count
    context_length: Count
    eos_token_ids: list[TokenId]


class _Model(_NeededOfModel, total=False):
    prompt_prefix: list[TokenId]
    bos_token_id: TokenId | None
    add_bos: bool
    long_after: Size
    images: ImageSettings
    source_digest: str


class _EmbeddingModel(TypedDict):
    family: str
    name: str
    vocab_size: Count
    context_length: Count
    dimension: Count
    embedding: EmbeddingSettings


class _NeededOfCache(TypedDict):
    page_size: Annotated[int, Range(1, 1 << 16)]
    dtype: DType
    layers: Annotated[int, Range(1, 1 << 16)]
    kv_heads: Annotated[int, Range(1, 1 << 16)]
    head_dim: Annotated[int, Range(1, 1 << 16)]


class _KeysOfPacked(TypedDict, total=False):
    balanced: bool
    centred: bool


class _Packed(_KeysOfPacked):
    """Keys and values in few bits: what they are rounded to, and bytes of a page and a sequence."""

    format: str
    newest: Annotated[int, Range(1, 1 << 16)]
    first: Annotated[int, Range(0, 1 << 16)]
    turned: bool
    four_over_six: bool
    page_bytes: Count
    sequence_bytes: Count


class _Cache(_NeededOfCache, total=False):
    prefill_chunk: Count
    packed: _Packed


class _Settings(TypedDict, total=False):
    format: str
    bits_per_weight: float
    bits_by_format: dict[str, float]
    ignored: list[str]
    overrides: dict[str, str]
    recipe: dict[str, Any]


class _Rows(TypedDict, total=False):
    rows: dict[str, str]


class _Linear(_Rows):
    name: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Versions:
    """Versions that built the artifact; the runtime refuses a different TVM or tvm_ffi."""

    amx_tvm: str
    tvm: str
    tvm_ffi: str


@dataclass(frozen=True)
class TargetRecord:
    """The machine an artifact is for.

    ``features`` are the instruction-set extensions that its code uses, in LLVM's or Linux's
    spelling (``avx512vnni`` or ``avx512_vnni``), or for CUDA the architecture (``sm_90a``).
    """

    key: str
    kind: str
    triple: str
    features: list[str] = field(default_factory=list)
    device: str = "cpu"


@dataclass(frozen=True)
class LibraryRecord:
    """The shared library: its file name, size in bytes and SHA-256 ("" until it is linked)."""

    file: FileName
    bytes: Size
    sha256: str


@dataclass(frozen=True)
class Variant:
    """Another library for the same parameters, for CPUs with more instruction sets."""

    target: TargetRecord
    library: LibraryRecord


@dataclass(frozen=True)
class ShardRecord:
    """One raw parameter file.

    ``crc32`` holds one checksum for every ``block_bytes`` of the file (the last block may be
    shorter): fast enough to check on every load, and able to say where damage lies.
    """

    file: FileName
    bytes: Size
    sha256: str
    block_bytes: Annotated[int, Range(1, 1 << 40)]
    crc32: list[Checksum]


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies: NumPy dtype name, shape, shard index, byte offset and size."""

    shape: list[Size]
    dtype: DType
    shard: Size
    offset: Size
    bytes: Size


@dataclass(frozen=True)
class Parameters:
    """All tensors. ``order`` is the order of the tuple that the library's functions take."""

    order: list[str]
    tensors: dict[str, TensorRecord]
    shards: list[ShardRecord]

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes, without the padding between them."""
        return sum(record.bytes for record in self.tensors.values())


@dataclass(frozen=True)
class Manifest:
    """Everything that manifest.json says; see the module's docstring and ``docs``.

    ``target`` and ``library`` are what runs on the most machines; ``variants``, the most demanding
    first, are taken instead where the CPU has what they need. ``recipes`` say how each parameter
    was made of the model's weights (``relax_passes.recipes``).
    """

    versions: Versions
    target: TargetRecord
    library: LibraryRecord
    parameters: Parameters
    model: dict[str, Any]
    quantization: dict[str, Any] = field(default_factory=dict)
    kv_cache: dict[str, Any] = field(default_factory=dict)
    linears: list[dict[str, Any]] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    files: dict[FileName, str] = field(default_factory=dict)
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    kind: str = "causal_lm"
    schema: int = SCHEMA
    variants: list[Variant] = field(default_factory=list)

    @property
    def linked(self) -> bool:
        """Whether there is a library; False for object files that are linked elsewhere."""
        return bool(self.library.sha256)

    @property
    def targets(self) -> list[str]:
        """The keys of the target and of the variants, the least demanding first."""
        return [self.target.key, *(variant.target.key for variant in reversed(self.variants))]

    @property
    def prompt_prefix(self) -> list[int]:
        """The token ids that every prompt begins with, most often BOS or none."""
        if "prompt_prefix" in self.model:
            return [int(token) for token in self.model["prompt_prefix"]]
        # Artifacts of version 0.1.0 say only whether it is BOS.
        first = self.model.get("bos_token_id")
        return [int(first)] if self.model.get("add_bos") and first is not None else []

    def for_cpu(self, present: frozenset[str]) -> Manifest:
        """Return the manifest with the target and library for a CPU with these features.

        Nothing is changed where no variant fits, or where the features are unknown (empty).
        """
        for variant in self.variants if present else ():
            if not missing_features(variant.target.features, present):
                return replace(self, target=variant.target, library=variant.library)
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest itself, as hexadecimal text; of `load`'s, not of `for_cpu`'s."""
        return _digest(asdict(self))

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON-ready data, ``digest`` included."""
        data = asdict(self)
        data["digest"] = _digest(data)
        return data

    def dumps(self) -> str:
        """Return the text of manifest.json."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n"

    def save(self, directory: Path | str) -> None:
        """Write manifest.json into an existing directory (atomicity is ArtifactWriter's part)."""
        (Path(directory) / FILE_NAME).write_text(self.dumps(), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path | str) -> Manifest:
        """Read and check manifest.json of an artifact directory.

        Raises
        ------
        ArtifactError
            No such directory or manifest, text that is not JSON, another schema version, missing
            keys, or content that does not match its digest.
        """
        path = Path(directory)
        file = path / FILE_NAME
        if not os.path.isdir(path):  # False for names too long as well
            raise ArtifactError(
                f"{path}: no such artifact directory; `amx-tvm compile MODEL --output {path}` "
                "makes one"
            )
        if not file.is_file():
            raise ArtifactError(
                f"{path} is not an artifact: it has no {FILE_NAME} (an interrupted compile leaves "
                "none); compile the model again"
            )
        data = read_json(file, ArtifactError, _AGAIN)
        return cls.from_dict(data, str(file))

    @classmethod
    def from_dict(cls, data: Any, source: str = FILE_NAME) -> Manifest:
        """Build a manifest from parsed JSON; ``source`` names it in errors."""
        if not isinstance(data, dict) or "schema" not in data:
            raise ArtifactError(f"{source}: not a manifest (no `schema` key); compile again")
        if data["schema"] != SCHEMA:
            raise ArtifactError(
                f"{source} has schema {data['schema']}, this version of amx_tvm reads schema "
                f"{SCHEMA}; compile the model again, or install the version that made it "
                f"(amx_tvm {_made_by(data)})"
            )
        if data.get("digest") != _digest(data):
            raise ArtifactError(
                f"{source} does not match its own digest: it was edited or damaged; compile the "
                "model again or copy the artifact anew"
            )
        try:
            manifest = conform(cls, {k: v for k, v in data.items() if k != "digest"})
        except Mismatch as problem:
            raise ArtifactError(f"{source}: {problem}; {_AGAIN}") from None
        manifest.check(source)
        return manifest

    def check(self, source: str = FILE_NAME) -> None:
        """Raise ArtifactError unless the parts fit together; also called before writing."""
        if self.kind not in KINDS:
            raise ArtifactError(f"{source}: kind is {self.kind!r}, expected one of {KINDS}")
        try:
            conform(_Settings, self.quantization, "quantization")
            conform(list[_Linear], self.linears, "linears")
            if self.kind == "causal_lm":
                conform(_Model, self.model, "model")
                conform(_Cache, self.kv_cache, "kv_cache")
            if self.kind == "embedding":
                conform(_EmbeddingModel, self.model, "model")
        except Mismatch as problem:
            raise ArtifactError(f"{source}: {problem}; {_AGAIN}") from None
        _check_parameters(self.parameters, source)


def _check_parameters(parameters: Parameters, source: str) -> None:
    """Every tensor lies inside its shard and has the size of its shape; the order names tensors.

    A shard has a checksum for each of its blocks: without one, a block would pass unread.
    """
    for shard in parameters.shards:
        if len(shard.crc32) != -(-shard.bytes // shard.block_bytes):
            raise ArtifactError(
                f"{source}: {shard.file} of {shard.bytes} bytes has {len(shard.crc32)} checksums "
                f"of blocks of {shard.block_bytes}; {_AGAIN}"
            )
    for name in parameters.order:
        if name not in parameters.tensors:
            raise ArtifactError(f"{source}: parameter {name!r} of the order has no tensor")
    for name, record in parameters.tensors.items():
        if record.shard >= len(parameters.shards):
            raise ArtifactError(f"{source}: {name!r} lies in shard {record.shard}, which is none")
        size = math.prod(record.shape) * np.dtype(record.dtype).itemsize
        shard = parameters.shards[record.shard]
        if size != record.bytes or record.offset % 64 or record.offset + size > shard.bytes:
            raise ArtifactError(
                f"{source}: {name!r} ({record.dtype} {record.shape}) does not fit at offset "
                f"{record.offset} of {shard.file} ({shard.bytes} bytes)"
            )


def _digest(data: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything but the digest itself."""
    rest = {key: value for key, value in data.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _made_by(data: dict[str, Any]) -> str:
    versions = data.get("versions")
    return str(versions.get("amx_tvm", "unknown")) if isinstance(versions, dict) else "unknown"


def artifact_bytes(directory: Path | str) -> int:
    """Return the size in bytes of all files under an artifact directory."""
    return sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
