"""From an opened model to a module that is ready to build, and what the manifest says of it."""

from __future__ import annotations

import os
from math import prod
from typing import Any

from amx_tvm.cache_storage import cache_storage
from amx_tvm.compiler.adapters import Adapters
from amx_tvm.compiler.balance import Balance
from amx_tvm.compiler.embedding import lower_embedding
from amx_tvm.compiler.function import lower_function
from amx_tvm.compiler.lowered_model import LoweredModel
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ModelError, TargetError
from amx_tvm.frontends import ModelSource
from amx_tvm.frontends.checkpoint import identify, open_weights
from amx_tvm.frontends.hf.embedding import EmbeddingSource
from amx_tvm.frontends.importers.relax_module import RelaxModuleSource
from amx_tvm.models import moe
from amx_tvm.models.config import DecoderConfig
from amx_tvm.models.registry import ModelFamily
from amx_tvm.targets import ResolvedTarget
from relax_passes import pipeline
from relax_passes import recipes as plans
from relax_passes.attention_spec import CacheStorage
from relax_passes.cache_spec import FORMATS
from relax_passes.kernels.cache_sizes import Sizes
from relax_passes.kernels.cpu.attention import PAGE_SIZE
from relax_passes.kernels.cpu.attention import config as cpu
from relax_passes.kernels.cuda.attention import config as cuda
from relax_passes.kernels.cuda.attention.config import PAGE_TOKENS
from relax_passes.rewriting import relax_functions


def lower_source(
    source: ModelSource,
    target: ResolvedTarget,
    config: QuantizationConfig,
    *,
    records: Any = None,
    dump_ir: str | os.PathLike[str] | None = None,
    adapters: Adapters | None = None,
) -> LoweredModel:
    """Build the Relax module of a model and run the passes on it.

    ``adapters`` stay apart from its weights, for rows to choose among.

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
    if isinstance(source, EmbeddingSource):
        return lower_embedding(source, target, config, records=records, dump=dump)
    family, decoder = identify(source)
    if config.attention:
        if target.device != "cpu":
            raise TargetError(
                f"attention quantized to {config.format} has kernels for CPUs only, and the target "
                f"is {target.key}; compile without quantized attention"
            )
    storage = cache_storage(config, decoder, target)
    on_cpu = target.device == "cpu"
    dtype = "float32" if on_cpu else "float16"
    network = family.build(decoder)
    seen = vision_of(source, family, decoder, target)
    if seen is not None:
        network.vision = seen.module
    network.to(dtype)
    module, weights = network.export_tvm(network.export_spec())
    shapes = {name: tuple(int(v) for v in p.shape) for name, p in weights}
    expected, stacks = moe.unstacked(shapes, decoder)
    named = open_weights(source, family, decoder, expected)
    if stacks:
        module = plans.write(module, {name: plans.Recipe(s) for name, s in stacks.items()})
    plan = None
    if adapters is not None:
        exact = config.format == "none" and on_cpu
        plan = adapters.plan(named, shapes, "float32" if exact else "float16")
    parts = (target.tvm, config, target.layout, records, dump, storage, plan)
    module = pipeline.run(module, *parts)
    if adapters is not None and plan is not None:
        adapters.check_used(plan, plans.read(module))
    return LoweredModel(
        module=module,
        model={
            **describe(source, decoder, family),
            **({} if adapters is None else {"adapters": adapters.names}),
            **longrope(decoder, target),
            **({} if seen is None else {"images": seen.settings.to_json()}),
        },
        kv_cache={
            "page_size": PAGE_TOKENS if not on_cpu and storage.packed is None else PAGE_SIZE,
            "dtype": storage.dtype or dtype,
            "layers": decoder.cached_layers,
            "kv_heads": decoder.num_kv_heads,
            "head_dim": (cpu if on_cpu else cuda).stored_channels(decoder.head_dim),
            **packed_cache(storage, decoder),
        },
        functions=[gvar.name_hint for gvar, _ in relax_functions(module)],
        weight_count=sum(prod(shape) for shape in expected.values()),
        source=named,
        adapters=adapters,
        # A model that was compiled before is balanced already.
        balance=Balance(named, decoder)
        if storage.packed is not None and storage.packed.balanced and not source.module_names
        else None,
    )


def vision_of(
    source: ModelSource, family: ModelFamily, decoder: DecoderConfig, target: ResolvedTarget
) -> Any:
    """Return what sees beside a decoder, a `Vision`; None where nothing does.

    Raises
    ------
    ModelError
        For a target without kernels for it, or a configuration that cannot be followed.
    """
    if family.vision is None:
        return None
    if target.device != "cpu":
        raise ModelError(
            f"{source.name} takes images, which is compiled for CPUs only; {target.key} is no CPU"
        )
    return family.vision(source.config, decoder)


def check_cache(source: ModelSource, config: QuantizationConfig, target: ResolvedTarget) -> None:
    """Refuse keys and values in few bits where nothing can keep them, before any work.

    Raises
    ------
    ModelError, TargetError
        For a source without a cache, a model that does not fit, or a target without kernels.
    """
    if config.kv_cache not in FORMATS:
        return
    if source.kind != "causal_lm":
        raise ModelError(
            f"{source.name} has no cache of keys and values to keep as {config.kv_cache}; leave "
            "kv_cache out"
        )
    cache_storage(config, identify(source)[1], target)


def packed_cache(storage: CacheStorage, decoder: DecoderConfig) -> dict[str, Any]:
    """Return what the manifest says of keys and values in few bits, beside the cache's shape."""
    if storage.packed is None:
        return {}
    layout = Sizes(storage.packed, decoder.cached_layers, decoder.num_kv_heads, decoder.head_dim)
    sizes = {"page_bytes": layout.page_bytes, "sequence_bytes": layout.sequence_bytes}
    return {"dtype": "float16", "packed": {**storage.packed.describe(), **sizes}}


def longrope(decoder: DecoderConfig, target: ResolvedTarget) -> dict[str, int]:
    """Return what the manifest says of a model whose rotary embedding depends on the length.

    "long_after" is the length after which a sequence's tokens are given as -1 - id
    (``amx_tvm.models.step.split_long``). Kernels of GPUs know one rotary embedding a layer: there
    the context ends where the short table does.
    """
    if not decoder.long_after:
        return {}
    name = "long_after" if target.device == "cpu" else "context_length"
    return {name: decoder.long_after}


def describe(source: ModelSource, decoder: DecoderConfig, family: ModelFamily) -> dict[str, Any]:
    """Return the manifest's "model" section.

    Raises
    ------
    ModelError
        For BOS and EOS tokens that the vocabulary does not have, but for those that nobody set.
    """
    generation, vocab = source.generation_config, decoder.vocab_size
    eos = generation.get("eos_token_id", [])
    unset = family.default_special_id if family.default_special_id not in range(vocab) else None
    ends = [end for end in (eos if isinstance(eos, (list, tuple)) else [eos]) if end != unset]
    first = generation.get("bos_token_id")
    first = None if first == unset else first
    prefix = list(generation.get("prompt_prefix", []))
    starts = [("bos", token) for token in (first, *prefix)]
    for name, token in [*starts, *(("eos", end) for end in ends)]:
        if token is not None and not 0 <= token < vocab:
            raise ModelError(
                f"{source.name}: {name}_token_id is {token}, and the model has a vocabulary of "
                f"{vocab}; correct its configuration"
            )
    return {
        "family": family.name,
        "name": source.name,
        # The runtime budgets memory by these three, whatever the family calls them.
        "config": {
            **source.config,
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.intermediate_size,
            "num_attention_heads": decoder.num_heads,
        },
        "vocab_size": vocab,
        "context_length": decoder.context_length,
        "eos_token_ids": ends,
        "bos_token_id": first,
        "prompt_prefix": prefix,
    }
