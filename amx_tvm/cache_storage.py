"""How a compiled model keeps keys and values: what the user asked for, where kernels take it."""

from __future__ import annotations

from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ModelError, TargetError
from amx_tvm.models.config import DecoderConfig
from amx_tvm.targets import ResolvedTarget
from relax_passes.attention_spec import CacheStorage
from relax_passes.cache_spec import FORMATS, CacheSpec
from relax_passes.kernels.base import TargetInfo
from relax_passes.kernels.cuda.packed_cache import layout as cuda


def cache_storage(
    config: QuantizationConfig, decoder: DecoderConfig, target: ResolvedTarget
) -> CacheStorage:
    """Choose what keys and values in the cache are, and what attention is rounded to.

    Raises
    ------
    TargetError, ModelError
        When what is asked for has no kernels on the target or for the model.
    """
    if config.kv_cache in FORMATS:
        return CacheStorage(packed=_packed(config, decoder, target))
    return CacheStorage(_type(config, decoder, target), config.format if config.attention else "")


def _packed(
    config: QuantizationConfig, decoder: DecoderConfig, target: ResolvedTarget
) -> CacheSpec:
    name, on_cpu = config.kv_cache, target.device == "cpu"
    spec = CacheSpec(name, centred=on_cpu and name != "int8")
    if config.attention:
        raise ModelError(
            f"quantized attention needs a float32 KV cache; leave out kv_cache {name!r}"
        )
    spec.check(decoder.head_dim)
    if not on_cpu:
        cuda.check(spec, decoder.head_dim)
    for what, found in (
        ("rotary embedding depends on the sequence's length", bool(decoder.long_after)),
        ("queries grow with their position", bool(decoder.query_growth)),
        ("layers share keys and values", decoder.cached_layers < decoder.num_layers),
    ):
        if found:
            raise ModelError(
                f"keys and values of this model cannot be kept as {name}: its {what}; leave "
                "kv_cache out"
            )
    return spec


def _type(config: QuantizationConfig, decoder: DecoderConfig, target: ResolvedTarget) -> str:
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
    if decoder.attention_sinks or config.attention:
        what = "attention sinks" if decoder.attention_sinks else "quantized attention"
        raise ModelError(f"{what} need a float32 KV cache; leave out kv_cache {config.kv_cache!r}")
    return config.kv_cache
