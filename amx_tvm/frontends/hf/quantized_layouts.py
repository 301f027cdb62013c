"""How checkpoints store 4-bit weights: which tensors hold the codes and scales of weight X.

    amx-tvm             X_codes, X_scale_<name>, [X_tensor_scale]          (amx-tvm quantize)
    compressed-tensors  X_packed, X_scale                                  mxfp4-pack-quantized
                        X_packed, X_scale, X_global_scale (divides)        nvfp4-pack-quantized
    modelopt            X, X_scale, X_scale_2 (multiplies)                 NVFP4
    mxfp4               X_blocks, X_scales                                 gpt-oss, X is a stack
    torchao             M._weight_qdata, M._weight_scale for X = M.weight  MXTensor
                        and M._weight_per_tensor_scale (multiplies)        NVFP4Tensor

In all of them a byte holds two codes, the even column in the low nibble, and group scales are E8M0
or E4M3 bytes, one row a weight's row. gpt-oss's blocks are [experts, N, K / 32, 16] and stay under
their own name, X_blocks with the shape [experts, N, K].

Sources: compressed-tensors 0.20 (compressors/mxfp4, nvfp4), torchao 0.18
(prototype/safetensors, prototype/mx_formats), the "modelopt" loader of vLLM, and transformers'
integrations/mxfp4.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

from amx_tvm import formats
from amx_tvm.errors import ModelError
from amx_tvm.formats import Format
from amx_tvm.schema import Mismatch, conform
from amx_tvm.strict_json import parse_json

METHOD = "amx-tvm"
CODES, SCALE, TENSOR_SCALE = "_codes", "_scale_", "_tensor_scale"
COMPRESSED = {"mxfp4-pack-quantized": "mxfp4", "nvfp4-pack-quantized": "nvfp4"}
TORCHAO = {"MXTensor": "mxfp4", "NVFP4Tensor": "nvfp4"}


@dataclass(frozen=True)
class Stored:
    """Where a weight lies: format, tensors of codes, scales and tensor scale.

    ``divide``: the tensor scale's inverse is stored. ``blocks``: codes are [.., groups, bytes].
    """

    format: Format
    codes: str
    scales: dict[str, str]
    tensor: str | None = None
    divide: bool = False
    blocks: bool = False

    @property
    def parts(self) -> list[str]:
        """Names of all tensors."""
        return [self.codes, *self.scales.values(), *([self.tensor] if self.tensor else [])]


class Quantization(TypedDict, total=False):
    """``quantization_config`` of ``config.json``, as far as it is read."""

    quant_method: str
    quant_algo: str
    format: str
    weights: dict[str, str]
    tie_word_embeddings: bool


class _Torchao(TypedDict, total=False):
    """torchao's description of a weight, in the metadata of its file."""

    _type: str
    _data: dict[str, Any]


Layout = Callable[[Any, dict[str, Any]], dict[str, Stored]]


def _own(source: Any, quantization: dict[str, Any]) -> dict[str, Stored]:
    found = {}
    for name in _stems(source, f".weight{CODES}", CODES):
        chosen = quantization.get("weights", {}).get(name)
        if chosen not in formats.names():
            raise ModelError(
                f"the quantization_config of {source.name} gives {name!r} the format {chosen!r}; "
                f"known are {', '.join(formats.names())}"
            )
        fmt = formats.get(chosen)
        scales = {s.name: f"{name}{SCALE}{s.name}" for s in fmt.scale_tensors}
        tensor = f"{name}{TENSOR_SCALE}" if fmt.row_scaled else None
        found[name] = Stored(fmt, name + CODES, scales, tensor)
    return found


def _compressed(source: Any, quantization: dict[str, Any]) -> dict[str, Stored]:
    fmt = formats.get(COMPRESSED[quantization["format"]])
    return {
        name: Stored(
            fmt,
            f"{name}_packed",
            {"scale": f"{name}_scale"},
            f"{name}_global_scale" if fmt.row_scaled else None,
            divide=True,
        )
        for name in _stems(source, ".weight_packed", "_packed")
    }


def _modelopt(source: Any, _quantization: dict[str, Any]) -> dict[str, Stored]:
    fmt = formats.get("nvfp4")
    return {
        name: Stored(fmt, name, {"scale": f"{name}_scale"}, f"{name}_scale_2")
        for name in _stems(source, ".weight_scale_2", "_scale_2")
    }


def _mxfp4(source: Any, _quantization: dict[str, Any]) -> dict[str, Stored]:
    fmt = formats.get("mxfp4")
    return {
        f"{name}_blocks": Stored(fmt, f"{name}_blocks", {"scale": f"{name}_scales"}, blocks=True)
        for name in _stems(source, "_blocks", "_blocks")
    }


def _torchao(source: Any, _quantization: dict[str, Any]) -> dict[str, Stored]:
    found = {}
    for stem in _stems(source, "._weight_qdata", "_qdata"):
        module = stem.removesuffix("._weight")
        name = f"{module}.weight"
        text = source.metadata.get(name, "{}")
        described = parse_json(text, f"the description of {name} in {source.name}", ModelError)
        try:
            described = conform(_Torchao, described, name)
        except Mismatch as problem:
            raise ModelError(f"{source.name}: the description of {problem}") from None
        kind, data = described.get("_type"), described.get("_data", {})
        if kind not in TORCHAO or "float4" not in json.dumps(data.get("elem_dtype", "float4")):
            raise ModelError(
                f"{name} of {source.name} is a torchao {kind or 'tensor without a description'}; "
                f"read are {' and '.join(TORCHAO)} of 4 bits"
            )
        if data.get("is_swizzled_scales"):
            raise ModelError(
                f"the scales of {name} in {source.name} are swizzled for one GPU; save the model "
                "with is_swizzled_scales=False"
            )
        tensor = f"{stem}_per_tensor_scale"
        stored = tensor if tensor in source.names() else None
        fmt = formats.get(TORCHAO[kind])
        found[name] = Stored(fmt, f"{stem}_qdata", {"scale": f"{stem}_scale"}, stored)
    return found


def _stems(source: Any, ending: str, cut: str) -> Iterable[str]:
    """Return the names of the tensors with an ending, without it."""
    return [name.removesuffix(cut) for name in source.names() if name.endswith(ending)]


def layout_of(quantization: dict[str, Any]) -> Layout | None:
    """Return the reader of a ``quantization_config``, or None for one that is not read."""
    method = quantization.get("quant_method")
    if method == METHOD:
        return _own
    if method == "compressed-tensors" and quantization.get("format") in COMPRESSED:
        return _compressed
    if method == "modelopt" and quantization.get("quant_algo") == "NVFP4":
        return _modelopt
    return {"mxfp4": _mxfp4, "torchao": _torchao}.get(str(method))


# Tensors beside the weights that quantize activations or caches, which are not used here.
UNUSED = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale", "_act_per_tensor_scale")
