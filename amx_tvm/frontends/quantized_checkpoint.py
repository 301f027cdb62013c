"""Hugging Face directories whose weights are 4-bit already: codes and scales pass through.

Three layouts are read; in all of them a byte holds two codes, the even column in the low nibble:

    amx-tvm             X.weight_codes, X.weight_scale_<name>, [X.weight_tensor_scale]
    compressed-tensors  X.weight_packed, X.weight_scale (E8M0 bytes: mxfp4-pack-quantized)
                        X.weight_packed, X.weight_scale (E4M3), X.weight_global_scale, by which the
                        scales are divided (nvfp4-pack-quantized)

The first is what ``amx-tvm quantize`` writes; docs/models.md describes it and reads it in 40 lines.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from amx_tvm import formats
from amx_tvm.errors import ModelError
from amx_tvm.formats import Quantized
from amx_tvm.frontends.source import ModelSource

METHOD = "amx-tvm"
CODES, SCALE, TENSOR_SCALE = "_codes", "_scale_", "_tensor_scale"
COMPRESSED = {"mxfp4-pack-quantized": "mxfp4", "nvfp4-pack-quantized": "nvfp4"}


def reads(config: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` is of a layout that is read here."""
    method = config.get("quant_method")
    return method == METHOD or (
        method == "compressed-tensors" and config.get("format") in COMPRESSED
    )


class QuantizedCheckpoint(ModelSource):
    """A checkpoint directory under the names of the unquantized model.

    Parameters
    ----------
    source : HuggingFaceSource
        The directory as its files name the tensors.

    Raises
    ------
    ModelError
        When a weight lacks one of its scales, or a format is unknown.
    """

    def __init__(self, source: Any) -> None:
        self.source, self.name = source, source.name
        self.generation_config = source.generation_config
        self.config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        quantization = source.config["quantization_config"]
        own = quantization["quant_method"] == METHOD
        codes = CODES if own else "_packed"
        self._quantized: dict[str, dict[str, Any]] = {}
        stored = source.names()
        for tensor in stored:
            if tensor.endswith(f".weight{codes}"):
                name = tensor.removesuffix(codes)
                made = self._own(name, quantization) if own else self._compressed(name)
                self._quantized[name] = {"codes": tensor, **made}
        parts = {
            part
            for entry in self._quantized.values()
            for part in (entry["codes"], *entry["scales"].values(), entry["tensor"])
        }
        for part in parts - set(stored) - {None}:
            raise ModelError(f"{source.name} lacks the tensor {part!r} of a quantized weight")
        self._names = [*(n for n in stored if n not in parts), *self._quantized]
        if own:
            self.config["tie_word_embeddings"] = bool(quantization["tie_word_embeddings"])

    def _own(self, name: str, quantization: dict[str, Any]) -> dict[str, Any]:
        chosen = quantization["weights"].get(name)
        if chosen not in formats.names():
            raise ModelError(
                f"the quantization_config of {self.name} gives {name!r} the format {chosen!r}; "
                f"known are {', '.join(formats.names())}"
            )
        fmt = formats.get(chosen)
        scales = {s.name: f"{name}{SCALE}{s.name}" for s in fmt.scale_tensors}
        tensor = f"{name}{TENSOR_SCALE}" if fmt.row_scaled else None
        return {"format": fmt, "scales": scales, "tensor": tensor, "divide": False}

    def _compressed(self, name: str) -> dict[str, Any]:
        fmt = formats.get(COMPRESSED[self.source.config["quantization_config"]["format"]])
        tensor = f"{name}_global_scale" if fmt.row_scaled else None
        scales = {"scale": f"{name}_scale"}
        return {"format": fmt, "scales": scales, "tensor": tensor, "divide": True}

    def names(self) -> list[str]:
        """Return the names of all weights."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        if name not in self._quantized:
            return self.source.shape(name)
        entry = self._quantized[name]
        rows, stored = self.source.shape(entry["codes"])
        return rows, stored * (2 if entry["format"].bits_per_value < 8 else 1)

    def dtype(self, name: str) -> str:
        """Return the stored type or the number format."""
        if name in self._quantized:
            return self._quantized[name]["format"].name
        return self.source.dtype(name)

    def load_raw(self, name: str) -> Quantized | None:
        """Return the stored codes and scales of a quantized weight."""
        if name not in self._quantized:
            return None
        entry = self._quantized[name]
        fmt, codes = entry["format"], self.source.stored(entry["codes"])
        if fmt.bits_per_value < 8:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
        tensor = None
        if entry["tensor"]:
            tensor = self.source.load(entry["tensor"]).reshape(())
            tensor = np.float32(1.0) / tensor if entry["divide"] else tensor
        types = {scale.name: scale.dtype for scale in fmt.scale_tensors}
        scales = {
            key: self.source.stored(stored).view(types[key])
            for key, stored in entry["scales"].items()
        }
        return Quantized(codes, scales, fmt, tensor)

    def load(self, name: str) -> np.ndarray:
        """Read one weight as float32."""
        raw = self.load_raw(name)
        return self.source.load(name) if raw is None else raw.format.dequantize(raw)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return self.source.nbytes

    def write_tokenizer(self, directory: str | os.PathLike[str]) -> list[str]:
        """Copy the tokenizer."""
        return self.source.write_tokenizer(directory)

    def digest(self) -> str:
        """Return the identity of the checkpoint."""
        return self.source.digest()
