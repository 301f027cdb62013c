"""quantize(): a model in, a safetensors checkpoint with 4-bit weights out.

The file holds the same codes and scales that compile() would make; compile() takes them without
another rounding. Layout and names: ``amx_tvm.frontends.hf.quantized_checkpoint``. Weights that
stay as they are keep their bits: bf16 ones as BF16, all others as F32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from amx_tvm import formats
from amx_tvm.artifact.publication import Publication
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import ArtifactError, ModelError
from amx_tvm.frontends import ModelSource, open_model
from amx_tvm.frontends.checkpoint import identify, open_weights
from amx_tvm.frontends.hf.quantized_layouts import CODES, METHOD, SCALE, TENSOR_SCALE
from amx_tvm.models import moe
from amx_tvm.models.config import STORED_BIASES

EMBEDDINGS = ("embed_tokens", "wpe")  # tables among the decoder's weights
_TYPES = {"float32": "F32", "uint8": "U8", "float16": "F16", "uint16": "BF16"}


def quantize_checkpoint(
    model: str | os.PathLike[str] | ModelSource,
    output: str | os.PathLike[str],
    quantization: str | QuantizationConfig = "amxfp4",
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Quantize a causal language model's weights and write them as a checkpoint.

    Parameters
    ----------
    model : path, hub id or ModelSource
        As for ``amx_tvm.compile``.
    output : path
        A new directory.
    quantization : str or QuantizationConfig
        Formats of the weights; the activation scheme does not matter here.
    progress : callable, optional
        Called with (done, total, name).

    Returns
    -------
    Path
        The directory, with config.json, model.safetensors and the tokenizer.

    Raises
    ------
    AmxError
        When the model is no causal language model, or the directory exists already.
    """
    config = QuantizationConfig.parse(quantization).resolve("cpu")
    source, place = open_model(model), Path(output)
    if source.kind != "causal_lm":
        raise ModelError(f"{source.name} is no language model; only those become checkpoints")
    if source.takes_images:
        raise ModelError(f"{source.name} takes images; checkpoints are made of text models only")
    names, chosen = _plan(source, config)
    with Publication(place) as new:
        if os.path.lexists(place):
            raise ArtifactError(f"{place} exists already; name a new directory")
        new.path.mkdir()
        _write(source, names, chosen, config, new, progress)
        new.publish()
    return place


def _write(
    source: ModelSource,
    names: list[str],
    chosen: dict[str, str],
    config: QuantizationConfig,
    new: Publication,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """Fill the directory: tokenizer and configuration first, then the weights, one at a time."""
    place = new.path
    source.write_tokenizer(place)
    layout = {name: _parts(source, name, chosen.get(name)) for name in names}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for parts in layout.values():
        for part, (shape, dtype) in parts.items():
            size = prod(shape) * np.dtype(dtype).itemsize
            header[part] = {
                "dtype": _TYPES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
    new.require(offset)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (place / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, name in enumerate(names):
            if progress is not None:
                progress(done, len(names), name)
            for array in _arrays(source, name, chosen.get(name)):
                file.write(np.ascontiguousarray(array).tobytes())
    described = {
        "quant_method": METHOD,
        "version": 1,
        "format": config.format,
        "weights": chosen,
        "tie_word_embeddings": bool(source.config.get("tie_word_embeddings", False)),
    }
    kept = {key: value for key, value in source.config.items() if key != STORED_BIASES}
    values = {**kept, "quantization_config": described}
    (place / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    generation = json.dumps(source.generation_config, indent=1)
    (place / "generation_config.json").write_text(generation, encoding="utf-8")


def _plan(source: ModelSource, config: QuantizationConfig) -> tuple[list[str], dict[str, str]]:
    """Return the tensors that the model needs, and the formats of those that are quantized.

    Formats are those that compile() would choose. Buffers and other tensors beside the weights are
    not among the names: nobody reads them.

    Weights that the module reads transposed, shifted or as an entry of a stack are left alone:
    compile() rounds those.
    """
    family, decoder = identify(source)
    network = family.build(decoder)
    shapes = {n: tuple(int(v) for v in p.shape) for n, p in network.named_parameters()}
    named = open_weights(source, family, decoder, moe.unstacked(shapes, decoder)[0])
    chosen = {}
    for name, parameter in network.named_parameters():
        if len(parameter.shape) != 2:
            continue
        stem = name.removesuffix(".weight")
        wanted = config.table(stem) if stem.endswith(EMBEDDINGS) else config.linear(stem).format
        for part in moe.sources_of(name, decoder) or (name,):
            place = named.weight(part)
            if place is None or place.transpose or place.offset or place.index is not None:
                continue
            if wanted != "none":
                chosen[place.name] = wanted
    needed = named.stored_names()
    return [name for name in source.names() if name in needed], chosen


def _parts(source: ModelSource, name: str, chosen: str | None) -> dict[str, tuple[tuple, str]]:
    """Return what is stored of a weight: tensor name -> (shape, NumPy type)."""
    shape = source.shape(name)
    if chosen is None:
        return {name: (shape, "uint16" if source.dtype(name) == "bf16" else "float32")}
    fmt, (rows, columns) = formats.get(chosen), shape
    if columns % max(2, fmt.group_size):
        raise ModelError(
            f"{name} has {columns} columns, which do not divide into groups of {fmt.group_size}; "
            "name it in QuantizationConfig.ignored"
        )
    packed = columns // 2 if fmt.bits_per_value < 8 else columns
    parts: dict[str, tuple[tuple[int, ...], str]] = {name + CODES: ((rows, packed), "uint8")}
    for scale in fmt.scale_tensors:
        parts[f"{name}{SCALE}{scale.name}"] = ((rows, columns // fmt.group_size), scale.dtype)
    if fmt.row_scaled:
        parts[name + TENSOR_SCALE] = ((1,), "float32")
    return parts


def _arrays(source: ModelSource, name: str, chosen: str | None) -> list[np.ndarray]:
    """Return the arrays of :func:`_parts`, in its order."""
    if chosen is None:
        array = np.ascontiguousarray(source.load(name), np.float32)
        if source.dtype(name) == "bf16":
            return [(array.view(np.uint32) >> 16).astype(np.uint16)]
        return [array]
    fmt, raw = formats.get(chosen), source.load_raw(name)
    if raw is None or raw.format.name != fmt.name:
        raw = fmt.quantize(source.load(name), name=name)
    codes = raw.codes
    if fmt.bits_per_value < 8:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    arrays = [codes, *(raw.scales[scale.name] for scale in fmt.scale_tensors)]
    if fmt.row_scaled:
        arrays.append(np.reshape(np.asarray(raw.tensor_scale), 1).astype(np.float32))
    return arrays
