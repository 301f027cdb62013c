"""Calibration of models of embeddings: GPTQ from example texts, in transformers' own model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from amx_tvm.calibration.api import Calibration, tokenizer_of
from amx_tvm.calibration.modules import calibrate_module
from amx_tvm.calibration.recipes import Recipe
from amx_tvm.config import QuantizationConfig
from amx_tvm.errors import CalibrationError
from amx_tvm.extras import require
from amx_tvm.frontends.family_source import FamilySource
from amx_tvm.frontends.hf.embedding import EmbeddingSource
from amx_tvm.models.embedding import EmbeddingModel
from amx_tvm.models.registry import find

MOST_TEXTS = 1024


def calibrate_embedding(
    source: EmbeddingSource,
    texts: Iterable[str],
    config: QuantizationConfig,
    recipe: str | Recipe | None = None,
) -> Calibration:
    """Round the linears of a model's body by a recipe.

    Parameters
    ----------
    source : EmbeddingSource
        The model.
    texts : iterable of str
        Documents; each of their lines is a text, cut at the longest that the model takes. The
        first 1024 count.
    config : QuantizationConfig
        Which linear gets which format.
    recipe : str or Recipe, optional
        As in `amx_tvm.calibration.calibrate_module`.

    Raises
    ------
    CalibrationError
        Without a text or transformers, or for a recipe that is for decoders.
    """
    transformers = require("transformers", "dev", "calibrating embeddings", CalibrationError)
    family = find(source.config, source.kind)
    shape = family.configure(source.config)
    network = EmbeddingModel(shape, family.build(shape), source.dense)
    weights = [name for name, _ in network.named_parameters() if name.startswith("model.")]
    stored = FamilySource(source, family, shape, weights)
    body = transformers.AutoModel.from_pretrained(source.directory, attn_implementation="eager")
    linears = {name: part for name, part in body.named_modules() if isinstance(part, nn.Linear)}
    found: dict[str, nn.Module] = {}
    for name in stored.names():
        place = stored.weight(name)
        held = place.name.removeprefix(family.prefix) if place is not None else ""
        part = linears.get(held.removesuffix(".weight"))
        if part is not None and name.endswith(".weight"):
            found[name.removesuffix(".weight")] = part
    calls = _calls(source, texts)
    return calibrate_module(_Renamed(body.float().eval(), found), calls, config, recipe)


class _Renamed(nn.Module):
    """A model whose linears have the names of the compiled module."""

    def __init__(self, body: nn.Module, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self._body = [body]  # in a list, so that its own names are none of this module's
        for name, part in parts.items():
            at: nn.Module = self
            *path, last = name.split(".")
            for step in path:
                if not hasattr(at, step):
                    at.add_module(step, nn.Module())
                at = getattr(at, step)
            at.add_module(last, part)

    def forward(self, ids: Tensor) -> Any:
        """Run the model on texts of one length, int64 [texts, tokens]."""
        return self._body[0](input_ids=ids, attention_mask=torch.ones_like(ids))


def _calls(source: EmbeddingSource, texts: Iterable[str]) -> list[tuple[Tensor]]:
    """Return texts without padding: one call for those of each length."""
    tokenizer = tokenizer_of(source)
    tokenizer.enable_truncation(source.settings.max_tokens)
    lines = [line for text in texts for line in text.splitlines() if line.strip()][:MOST_TEXTS]
    if not lines:
        raise CalibrationError("the calibration text is empty, expected at least one line")
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for encoding in tokenizer.encode_batch(lines):
        by_length[len(encoding.ids)].append(encoding.ids)
    return [(torch.tensor(same),) for same in by_length.values()]
