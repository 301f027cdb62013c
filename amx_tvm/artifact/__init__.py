"""The compiled artifact: a directory with a library, raw parameter shards and a manifest.

Layout::

    lib.so                    a TVM virtual-machine executable
    params/shard-00000.bin    raw tensors, each at a multiple of 64 bytes
    manifest.json             what everything is, with sizes and digests; written last
    tokenizer.json ...        the model's own tokenizer files

Reading needs NumPy and the standard library only, so a device that runs an artifact needs nothing
that compiles one.
"""

from amx_tvm.artifact.manifest import (
    SCHEMA,
    LibraryRecord,
    Manifest,
    Parameters,
    ShardRecord,
    TargetRecord,
    TensorRecord,
    Variant,
    Versions,
    artifact_bytes,
)
from amx_tvm.artifact.shards import ParameterWriter, open_parameters
from amx_tvm.artifact.verify import verify_artifact
from amx_tvm.artifact.writer import ArtifactWriter

__all__ = [
    "SCHEMA",
    "ArtifactWriter",
    "LibraryRecord",
    "Manifest",
    "ParameterWriter",
    "Parameters",
    "ShardRecord",
    "TargetRecord",
    "TensorRecord",
    "Variant",
    "Versions",
    "artifact_bytes",
    "open_parameters",
    "verify_artifact",
]
