"""From an opened model to a module that is ready to build, and what the manifest says of it."""

from __future__ import annotations

import os
from dataclasses import replace
from math import prod
from typing import Any

from amx_tvm.compiler.function import lower_function
from amx_tvm.compiler.lowered_model import LoweredModel
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ModelError, TargetError
from amx_tvm.frontends import ModelSource
from amx_tvm.frontends.family_source import FamilySource
from amx_tvm.frontends.importers.relax_module import RelaxModuleSource
from amx_tvm.models import ModelFamily, find, moe
from amx_tvm.models.config import DecoderConfig
from amx_tvm.targets import ResolvedTarget
from relax_passes import pipeline
from relax_passes import recipes as plans
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cpu.attention import PAGE_SIZE
from relax_passes.passes import bundle_parameters, legalize


def lower_source(
    source: ModelSource,
    target: ResolvedTarget,
    config: QuantizationConfig,
    *,
    records: Any = None,
    dump_ir: str | os.PathLike[str] | None = None,
) -> LoweredModel:
    """Build the Relax module of a model and run the passes on it.

    Raises
    ------
    ModelError
        When the architecture is unknown, or the checkpoint's weights are not those of its
        configuration.
    """
    dump = pipeline.dump_to(dump_ir) if dump_ir is not None else None
    if isinstance(source, RelaxModuleSource):
        if config.attention:
            raise ModelError(
                f"{source.name} is a function, whose attention is ordinary operators; quantized "
                "attention is for causal language models"
            )
        return lower_function(source, target, config, records=records, dump=dump)
    family = find(source.config)
    decoder = family.configure(source.config)
    if config.attention:
        if target.device != "cpu":
            raise TargetError(
                f"attention quantized to {config.format} has kernels for CPUs only, and the target "
                f"is {target.key}; compile without quantized attention"
            )
        decoder = replace(decoder, attention_format=config.format)
    decoder = replace(decoder, cache_dtype=cache_type(config, decoder, target))
    check_layers(source, family, decoder)
    check_experts(decoder, target)
    dtype = "float32" if target.device == "cpu" else "float16"
    with target.tvm:
        network = family.build(decoder)
        network.to(dtype)
        module, weights = network.export_tvm(network.export_spec())
    shapes = {name: tuple(int(v) for v in p.shape) for name, p in weights}
    expected, stacks = moe.unstacked(shapes, decoder)
    named = FamilySource(source, family, decoder, expected)
    check_shapes(named, expected)
    if stacks:
        module = plans.write(module, {name: plans.Recipe(s) for name, s in stacks.items()})
    functions = sorted(g.name_hint for g in module.get_global_vars())
    functions = [f for f in functions if f in PUBLIC_FUNCTIONS]
    module = pipeline.run(module, target.tvm, config, target.layout, records, dump)
    return LoweredModel(
        module=module,
        order=bundle_parameters.order_of(module),
        plan=plans.read(module),
        linears=legalize.kernels_of(module),
        model=describe(source, decoder, family.name),
        kv_cache={
            "page_size": PAGE_SIZE if target.device == "cpu" else 16,
            "dtype": decoder.cache_dtype or dtype,
            "layers": decoder.num_layers,
            "kv_heads": decoder.num_kv_heads,
            "head_dim": decoder.head_dim,
        },
        functions=functions,
        weight_count=sum(prod(shape) for shape in expected.values()),
        source=named,
    )


PUBLIC_FUNCTIONS = (
    "prefill",
    "score",
    "decode",
    "begin_greedy",
    "decode_greedy",
    "decode_batch",
    "decode_few",
    "create_kv_cache",
)


def cache_type(config: QuantizationConfig, decoder: DecoderConfig, target: ResolvedTarget) -> str:
    """Choose the type of keys and values in a CPU's cache; "" for the hidden states'.

    Raises
    ------
    TargetError, ModelError
        When float16 is asked for where no kernels take it.
    """
    if config.kv_cache == "float32" or (config.kv_cache == "auto" and config.activation != "int8"):
        return ""
    if target.device != "cpu":
        if config.kv_cache == "auto":
            return ""
        raise TargetError(
            f"kv_cache is {config.kv_cache!r}, a choice for CPUs, and the target is {target.key}, "
            "whose cache is float16 always; leave it out"
        )
    info = TargetInfo.of(target.tvm)
    converts = info.arch == "aarch64" or info.has("f16c") or info.has("avx512f")
    if config.kv_cache == "auto":
        return "float16" if converts and not decoder.attention_sinks else ""
    if decoder.attention_sinks or decoder.attention_format:
        what = "attention sinks" if decoder.attention_sinks else "quantized attention"
        raise ModelError(f"{what} need a float32 KV cache; leave out kv_cache {config.kv_cache!r}")
    return config.kv_cache


def check_layers(source: ModelSource, family: ModelFamily, decoder: DecoderConfig) -> None:
    """Refuse a checkpoint that has fewer layers than its configuration says."""
    last = f"model.layers.{decoder.num_layers - 1}.self_attn.o_proj.weight"
    stored = last if source.module_names else family.weights(last, decoder)[0].name
    if stored not in source.names():
        raise ModelError(
            f"{source.name} says it has {decoder.num_layers} layers but holds no {stored!r}; the "
            "checkpoint is incomplete or of another architecture"
        )


def check_experts(decoder: DecoderConfig, target: ResolvedTarget) -> None:
    """Refuse a mixture of experts for a target without grouped products."""
    if decoder.experts and target.device != "cpu":
        raise ModelError(
            f"this {decoder.family} model has {decoder.experts} experts, whose grouped products "
            f"have kernels for CPUs only; {target.key} is no CPU"
        )


def check_shapes(source: FamilySource, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose weights are missing or of other shapes, naming the first."""
    present = set(source.names())
    for name, shape in expected.items():
        if name not in present:
            raise ModelError(
                f"{source.name} holds no weight {name!r}, which its configuration asks for; the "
                "checkpoint is incomplete or of another architecture"
            )
        if tuple(source.shape(name)) != shape:
            raise ModelError(
                f"{source.name}: {name} has shape {list(source.shape(name))}, the "
                f"configuration asks for {list(shape)}"
            )


def describe(source: ModelSource, decoder: DecoderConfig, family: str) -> dict[str, Any]:
    """Return the manifest's "model" section."""
    generation = source.generation_config
    eos = generation.get("eos_token_id", [])
    return {
        "family": family,
        "name": source.name,
        "config": source.config,
        "vocab_size": decoder.vocab_size,
        "context_length": decoder.context_length,
        "eos_token_ids": list(eos) if isinstance(eos, (list, tuple)) else [eos],
        "bos_token_id": generation.get("bos_token_id"),
        "add_bos": bool(generation.get("add_bos", False)),
    }
