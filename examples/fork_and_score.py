"""The most likely continuation of a prompt: python examples/fork_and_score.py ARTIFACT.

The prompt is computed once; each choice continues a fork of it.
"""

import sys

import numpy as np

import amx_tvm

PROMPT = "The capital of France is"
CHOICES = (" Paris", " London", " a banana")


def log_probabilities(logits):
    """Return log-softmax of float32 logits [..., vocab]."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


engine = amx_tvm.load(sys.argv[1])
with engine.sequence() as prompt:
    first = prompt.append(engine.encode(PROMPT))
    scores = {}
    for choice in CHOICES:
        tokens = engine.tokenizer.encode(choice, add_special_tokens=False).ids
        with prompt.fork() as branch:
            rows = np.vstack([first, branch.score(tokens)[:-1]])
        scores[choice] = log_probabilities(rows)[range(len(tokens)), tokens].sum()
for choice, score in sorted(scores.items(), key=lambda pair: -pair[1]):
    print(f"{score:8.2f}  {PROMPT}{choice}")
