"""Search by meaning: python examples/search.py ARTIFACT FILE QUESTION.

ARTIFACT is a compiled model of embeddings, such as all-MiniLM-L6-v2; each line of FILE is a text.
"""

import sys
from pathlib import Path

import numpy as np

import amx_tvm

artifact, file, question = sys.argv[1:]
engine = amx_tvm.load(artifact)
texts = [line for line in Path(file).read_text("utf-8").splitlines() if line.strip()]
vectors = engine.embed(texts, truncate=True)  # of length 1: a product is a cosine
scores = vectors @ engine.embed(question)
for place in np.argsort(-scores)[:3]:
    print(f"{scores[place]:.3f}  {texts[place]}")
