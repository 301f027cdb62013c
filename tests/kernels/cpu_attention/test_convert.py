"""Conversion between the hidden states' type and the cache's, and which type a cache gets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm

from amx_tvm.cache_storage import cache_storage
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import FormatError, ModelError, TargetError
from amx_tvm.models.config import DecoderConfig
from amx_tvm.targets import host_options, resolve
from relax_passes.cache_spec import CacheSpec
from relax_passes.kernels.cpu.attention.convert import convert

HOST = tvm.target.Target(host_options())
DECODER = DecoderConfig("llama", 64, 64, 128, 2, 2, 1, 32, 128, 1e-5, 10000.0)
INT8 = QuantizationConfig("amxfp4", "int8")


@pytest.mark.parametrize("tokens", [1, 3, 20])  # 20: the tokens run in parallel
def test_convert(tokens):
    x = np.random.default_rng(tokens).normal(0, 3, (tokens, 5, 32)).astype(np.float32)
    x[0, 0, :4] = [0.0, -0.0, 65504.0, 6e-8]
    there, back = (
        tvm.compile(
            tvm.IRModule({"f": convert(5, 32, *types).with_attr("global_symbol", "f")}), HOST
        )
        for types in (("float32", "float16"), ("float16", "float32"))
    )
    half = tvm.runtime.tensor(np.empty(x.shape, np.float16))
    there["f"](tvm.runtime.tensor(x), half)
    np.testing.assert_array_equal(half.numpy(), x.astype(np.float16))
    y = tvm.runtime.tensor(np.empty_like(x))
    back["f"](half, y)
    np.testing.assert_array_equal(y.numpy(), x.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    "config,target,expected",
    [
        (INT8, "llvm:x86-64-v3", "float16"),
        (INT8, "llvm:x86-64-v2", ""),  # no instruction converts float16
        (replace(INT8, kv_cache="float32"), "llvm:x86-64-v3", ""),
        (replace(INT8, kv_cache="float16"), "llvm:x86-64-v2", "float16"),
        (replace(INT8, activation="float32"), "llvm:x86-64-v3", ""),  # the strict mode is exact
        (replace(INT8, activation="w4a4"), "llvm:x86-64-v3", ""),
        (replace(INT8, activation="float16"), "cuda:sm_90a", ""),
    ],
)
def test_type_of_the_cache(config, target, expected):
    assert cache_storage(config, DECODER, resolve(target)).dtype == expected


def test_few_bits_where_they_cannot_be():
    few, host = replace(INT8, kv_cache="amxfp4"), resolve("llvm:x86-64-v2")
    assert cache_storage(few, DECODER, host).packed == CacheSpec("amxfp4", centred=True)
    for config, decoder, target, message in (
        (few, DECODER, resolve("cuda:sm_90a"), "heads of 32 channels .* on GPUs"),
        (few, replace(DECODER, head_dim=48), host, "heads of 48 channels cannot be kept as amxfp4"),
        (few, replace(DECODER, query_growth=(0.1, 8192)), host, "its queries grow"),
        (replace(few, attention=True), DECODER, host, "quantized attention needs a float32"),
    ):
        with pytest.raises((TargetError, ModelError), match=message):
            cache_storage(config, decoder, target)
    with pytest.raises(FormatError, match="'int4'; known are auto, float32, float16, int8, amxfp4"):
        QuantizationConfig.parse(replace(INT8, kv_cache="int4"))


def test_float16_where_it_cannot_be():
    half = replace(INT8, kv_cache="float16")
    with pytest.raises(TargetError, match="a choice for CPUs"):
        cache_storage(half, DECODER, resolve("cuda:sm_90a"))
    host = resolve("llvm:x86-64-v3")
    sinks = replace(DECODER, attention_sinks=True)
    assert cache_storage(INT8, sinks, host).dtype == ""
    with pytest.raises(ModelError, match="attention sinks need a float32 KV cache"):
        cache_storage(half, sinks, host)
    with pytest.raises(FormatError, match="unknown type of the KV cache 'bf16'"):
        QuantizationConfig.parse(replace(INT8, kv_cache="bf16"))
