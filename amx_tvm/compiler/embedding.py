"""Lowering of a model that makes embeddings: one function over packed texts, without a cache."""

from __future__ import annotations

from math import prod
from typing import Any

from amx_tvm.compiler.lowered_model import LoweredModel
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ModelError
from amx_tvm.frontends.checkpoint import check_layers, open_weights
from amx_tvm.frontends.hf.embedding import EmbeddingSource
from amx_tvm.models.config_reader import check_shape
from amx_tvm.models.embedding import FUNCTION, EmbeddingModel
from amx_tvm.models.registry import find
from amx_tvm.targets import ResolvedTarget
from relax_passes import pipeline


def lower_embedding(
    source: EmbeddingSource,
    target: ResolvedTarget,
    config: QuantizationConfig,
    *,
    records: Any = None,
    dump: pipeline.Dump | None = None,
) -> LoweredModel:
    """Build the model's function and run the passes on it.

    Raises
    ------
    ModelError
        For a quantization without kernels for such models, an unknown architecture, or weights
        that do not fit the configuration.
    """
    if config.attention:
        raise ModelError(
            f"{source.name} makes embeddings; quantized attention is for causal language models"
        )
    family = find(source.config, source.kind)
    shape = check_shape(family.configure(source.config))
    check_layers(source, family, shape)
    sizes = [shape.hidden_size, *(size for d in source.dense for size in (d.inputs, d.outputs))]
    for made, read in zip(sizes[::2], sizes[1::2], strict=False):
        if made != read:
            raise ModelError(
                f"{source.name}: a dense layer has in_features {read}, and what stands before it "
                f"gives {made}"
            )
    network = EmbeddingModel(shape, family.build(shape), source.dense)
    network.to("float32" if target.device == "cpu" else "float16")
    module, weights = network.export_tvm(network.export_spec())
    shapes = {name: tuple(int(v) for v in p.shape) for name, p in weights}
    named = open_weights(source, family, shape, shapes)
    module = pipeline.run(module, target.tvm, config, target.layout, records, dump)
    return LoweredModel(
        module=module,
        model={
            "family": family.name,
            "name": source.name,
            "config": source.config,
            "vocab_size": shape.vocab_size,
            "context_length": shape.context_length,
            "dimension": sizes[-1],
            "embedding": source.settings.to_json(),
        },
        kv_cache={},
        functions=[FUNCTION],
        weight_count=sum(prod(size) for size in shapes.values()),
        source=named,
    )
